"""Weights in every format, there and back; and folders written here by hand, against NumPy."""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
import numpy_models
import pytest
import safetensors.numpy
import tiny_weights
from etils import epath
from reference import resized

import clip_jax
from clip_jax import models, weights
from clip_jax.models.sizes import IMAGE_MEAN, IMAGE_STD
from clip_jax.weights.convert import (
    big_vision,
    formats,
    huggingface,
    mapping,
    open_clip,
    open_clip_settings,
    openai,
    preprocessing,
    torch_files,
)
from clip_jax.weights.model import Tensors, Weights, variable_shapes

FORMS = [
    *(("vit", name) for name in ("clip_jax", "huggingface", "open_clip", "openai")),
    *(("clipa", name) for name in ("clip_jax", "open_clip")),
    *(("gelu", name) for name in ("clip_jax", "huggingface", "open_clip")),
    *(("resnet", name) for name in ("clip_jax", "open_clip", "openai")),
    *(("siglip", name) for name in ("clip_jax", "huggingface", "big_vision")),
]


@pytest.mark.parametrize(("kind", "name"), FORMS)
def test_there_and_back(kind: str, name: str, tmp_path: pathlib.Path, monkeypatch):
    ours = tiny_weights.make(kind)
    target = tmp_path / "deep" / f"model{formats.FORMATS[name].suffix}"
    weights.save(ours, target, name)
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    if name == "openai":  # a state dict names no model: as if this were one of ours
        monkeypatch.setitem(models.sizes.SIZES, kind, ours.size)
        tiny_weights.assert_same(weights.open(target, model=kind), ours)
    else:
        tiny_weights.assert_same(weights.open(target), ours)


@pytest.mark.parametrize("name", models.available_models())
def test_every_model_has_its_place_in_the_formats(name: str):
    """Nothing is left over on either side, and settings survive; by shapes alone."""
    size = models.get_size(name)
    shapes = variable_shapes(size)

    def check(table):
        theirs = mapping.their_shapes(table, shapes)
        assert len(theirs) == len(table)
        assert sum(map(np.prod, theirs.values())) == sum(map(np.prod, shapes.values()))
        return theirs

    siglip = size.image_pool == "map"
    check(open_clip.table(size, custom_text=siglip))
    if name.startswith("PE"):  # timm's have a bias, and shapes of their own
        check(openai.table(size))
        bias = dataclasses.replace(size, image_projection_bias=True)
        assert open_clip_settings.size_of(open_clip_settings.config_of(bias), name) == bias
        return
    if not siglip:
        assert open_clip_settings.size_of(open_clip_settings.config_of(size), name) == size
    if not (size.is_resnet or name.startswith("CLIPA")):
        check(huggingface.table(size))
        config = huggingface.config_of(size), preprocessing.to_transformers(size)
        assert huggingface.size_of(*config, name) == size
    if siglip:
        for stacked in (False, True):
            theirs = check(big_vision.table(size, stacked))
            assert big_vision.size_of(theirs, name) == size
    elif size.activation == "quick_gelu" and size.end_token is None:
        assert openai.size_of(check(openai.table(size)), name) == size


# ---- Against NumPy -----------------------------------------------------------------------------


def nested(ours: Weights) -> dict:
    """The parameters as the NumPy reference takes them."""
    tree: dict = {}
    for path in ours.tensors.shapes:
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = ours.tensors.read(path).astype(np.float64)
    return tree["params"]


def hugging_face_tensors(p: dict, siglip: bool) -> dict[str, np.ndarray]:
    """transformers' names and layouts, written out once more."""
    found = {"logit_scale": p["logit_scale"].reshape((1,) if siglip else ())}

    def norm(name: str, part: dict):
        found[f"{name}.weight"], found[f"{name}.bias"] = part["scale"], part["bias"]

    def linear(name: str, kernel: np.ndarray, bias: np.ndarray):
        found[f"{name}.weight"], found[f"{name}.bias"] = kernel.T, bias

    def tower(name: str, part: dict, width: int = 64):
        blocks = part["transformer"]["blocks"]
        for i in range(2):
            stem = f"{name}.encoder.layers.{i}"
            for j, letter in enumerate("qkv"):
                kernel = blocks["qkv"]["kernel"][i, :, j].reshape(width, width)
                bias = blocks["qkv"]["bias"][i, j].reshape(width)
                linear(f"{stem}.self_attn.{letter}_proj", kernel, bias)
            kernel = blocks["attn_out"]["kernel"][i].reshape(width, width)
            linear(f"{stem}.self_attn.out_proj", kernel, blocks["attn_out"]["bias"][i])
            for ours, theirs in (("mlp_in", "mlp.fc1"), ("mlp_out", "mlp.fc2")):
                linear(f"{stem}.{theirs}", blocks[ours]["kernel"][i], blocks[ours]["bias"][i])
            for number in "12":
                layer = {k: v[i] for k, v in blocks[f"ln_{number}"].items()}
                norm(f"{stem}.layer_norm{number}", layer)
        found[f"{name}.embeddings.position_embedding.weight"] = part["positions"]

    image, text = p["image"], p["text"]
    tower("vision_model", image)
    tower("text_model", text)
    found["text_model.embeddings.token_embedding.weight"] = text["token_embed"]["embedding"]
    norm("text_model.final_layer_norm", text["ln_final"])
    norm("vision_model.post_layernorm", image["ln_post"])
    patches = "vision_model.embeddings.patch_embedding"
    found[f"{patches}.weight"] = np.einsum("yxcd->dcyx", image["patch_embed"]["kernel"])
    if not siglip:
        found["vision_model.embeddings.class_embedding"] = image["class_token"]
        found["visual_projection.weight"] = image["projection"]["kernel"].T
        found["text_projection.weight"] = text["projection"]["kernel"].T
        norm("vision_model.pre_layrnorm", image["ln_pre"])
        return found
    found[f"{patches}.bias"] = image["patch_embed"]["bias"]
    found["logit_bias"] = p["logit_bias"][None]
    linear("text_model.head", text["projection"]["kernel"], text["projection"]["bias"])
    head, stem = image["map_head"], "vision_model.head"
    parts = [head[name] for name in ("query", "key", "value")]
    kernels = [part["kernel"].reshape(64, 64).T for part in parts]
    found[f"{stem}.attention.in_proj_weight"] = np.concatenate(kernels)
    found[f"{stem}.attention.in_proj_bias"] = np.concatenate([x["bias"].ravel() for x in parts])
    kernel = head["attn_out"]["kernel"].reshape(64, 64)
    linear(f"{stem}.attention.out_proj", kernel, head["attn_out"]["bias"])
    norm(f"{stem}.layernorm", head["ln"])
    linear(f"{stem}.mlp.fc1", head["mlp_in"]["kernel"], head["mlp_in"]["bias"])
    linear(f"{stem}.mlp.fc2", head["mlp_out"]["kernel"], head["mlp_out"]["bias"])
    found[f"{stem}.probe"] = head["probe"][None, None]
    return found


def write_hugging_face(folder: pathlib.Path, kind: str, dtype) -> Weights:
    """A folder in two shards, as transformers saves large models; what it omits is its default."""
    ours, siglip = tiny_weights.make(kind), kind == "siglip"
    size = ours.size
    shared = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
    text = {**shared, "num_attention_heads": 1, "max_position_embeddings": 10}
    text["vocab_size"] = size.vocab_size
    vision = {**shared, "num_attention_heads": size.image_heads, "image_size": 32, "patch_size": 8}
    config = {"model_type": "siglip" if siglip else "clip", "projection_dim": 32}
    config |= {"text_config": text, "vision_config": vision}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = hugging_face_tensors(nested(ours), siglip)
    tensors = {name: np.array(x, dtype, order="C") for name, x in tensors.items()}
    tensors["text_model.embeddings.position_ids"] = np.arange(10)[None]  # in older ones
    names, index = sorted(tensors), {}
    for i in (0, 1):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        safetensors.numpy.save_file({name: tensors[name] for name in names[i::2]}, folder / file)
        index |= dict.fromkeys(names[i::2], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return ours


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [("vit", np.float32, 1e-5), ("vit", ml_dtypes.bfloat16, 0.1), ("siglip", np.float32, 1e-5)],
)
def test_a_folder_of_transformers(kind: str, dtype, tolerance: float, tmp_path: pathlib.Path):
    """Loaded, it embeds as the reference does. The tolerance is for the rounding of the weights."""
    ours = write_hugging_face(tmp_path / "hub", kind, dtype)
    model = clip_jax.load(tmp_path / "hub")
    assert model.net.size == ours.size
    p, rng = nested(ours), np.random.default_rng(1)
    pictures = rng.integers(0, 256, (3, 32, 32, 3), np.uint8)
    tokens = rng.integers(3, 58, (3, 10))
    if kind == "siglip":
        # The reference has CLIP's normalisation: undo it, and do SigLIP's.
        normalised = (pictures / 255 - 0.5) / 0.5
        undone = 255 * (normalised * np.array(IMAGE_STD) + np.array(IMAGE_MEAN))
        image = numpy_models.siglip_vit(undone, p["image"], 8)
        text = numpy_models.siglip_text(tokens, p["text"])
    else:
        tokens[:, -1] = 49_407
        image = numpy_models.vit(pictures, p["image"], 8)
        text = numpy_models.text(tokens, p["text"])
    np.testing.assert_allclose(model.encode_image(pictures), image, atol=tolerance)
    found = model.net.apply(model.variables, tokens.astype(np.int32), method="encode_text")
    np.testing.assert_allclose(found, text, atol=tolerance)
    if dtype == np.float32:
        tiny_weights.assert_same(weights.open(tmp_path / "hub"), ours)


# ---- Positions ---------------------------------------------------------------------------------


def test_positions_are_resized(tmp_path: pathlib.Path):
    """Bicubic and linear; all else stays as it is."""
    ours = tiny_weights.make("vit")
    other = ours.resized(image_size=56, context_length=25)
    assert (other.size.image_size, other.size.context_length) == (56, 25)
    weights.save(other, tmp_path / "other")
    read = weights.open(tmp_path / "other").tensors.read
    image, text = "params/image/positions", "params/text/positions"
    np.testing.assert_allclose(read(image), resized(ours.tensors.read(image), 7), atol=1e-5)
    old = ours.tensors.read(text)
    where = (np.arange(25) + 0.5) * 10 / 25 - 0.5
    wanted = np.stack([np.interp(where, np.arange(10), column) for column in old.T], axis=1)
    np.testing.assert_allclose(read(text), wanted, atol=1e-5)
    for name in ours.tensors.shapes:
        if name not in (image, text):
            np.testing.assert_array_equal(read(name), ours.tensors.read(name))


# ---- PyTorch's files ---------------------------------------------------------------------------


def test_torch_files(tmp_path: pathlib.Path):
    """Scalars, vectors and matrices, and nothing is read before it is asked for."""
    arrays = {"a": np.float32(3) * np.ones(()), "b.c": np.arange(5), "d": np.eye(3, 4)}
    shapes = {name: value.shape for name, value in arrays.items()}
    torch_files.write(Tensors(shapes, arrays.__getitem__), tmp_path / "x.pt")
    found = torch_files.read(epath.Path(tmp_path / "x.pt"))
    assert found.code == ""
    assert dict(found.tensors.shapes) == shapes
    for name, value in arrays.items():
        np.testing.assert_array_equal(found.tensors.read(name), value.astype(np.float32))
