"""Weights of transformers, open_clip and OpenAI's code, converted there and back through files.

Random weights; each peer loads what is written here, and gives the same embeddings and loss.
"""

import functools
import importlib.metadata
import importlib.util
import math
import pathlib

import jax
import numpy as np
import pytest

from clip_jax import convert, losses, models, weights
from clip_jax.weights import Weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
open_clip = pytest.importorskip("open_clip")

TOLERANCE = 1e-4  # relative to the largest entry; seen: 3e-6
SHORT = {"image_layers": (1,), "text_layers": 1}
# Full width; fewer layers, blocks or pixels where that saves time.
VITS = {
    "ViT-B/32": {},
    "ViT-B/16": SHORT,
    "ViT-L/14": SHORT,
    "ViT-L/14@336px": SHORT,
    "ViT-H/14": SHORT,
    "ViT-g/14": SHORT,
}
RESNETS = {
    "RN50": {"text_layers": 1},
    **{
        name: {"image_layers": (1, 2, 1, 1), "text_layers": 1, "image_size": 64}
        for name in ("RN101", "RN50x4", "RN50x16", "RN50x64")
    },
}
SIGLIPS = {"SigLIP-B/16": SHORT, "SigLIP-So400m/14": SHORT}


def random_weights(size: models.Size, tokenizer=convert.tokens.OPENAI) -> Weights:
    """Gains and statistics away from 0 and 1, which would hide mistakes."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, shape in weights.variable_shapes(size).items():
        if name.endswith("logit_scale"):
            value = np.full((), math.log(20))
        elif name.endswith("logit_bias"):
            value = np.full((), -3.0)
        elif name.endswith(("scale", "var")):
            value = rng.uniform(0.5, 1.5, shape)
        elif name.endswith(("bias", "mean", "positions", "embedding", "class_token", "probe")):
            value = rng.normal(0, 0.1, shape)
        else:
            fan_in = math.prod(shape[:-1]) if "blocks" not in name else math.prod(shape[1:-1])
            value = rng.normal(0, fan_in**-0.5, shape)
        arrays[name] = np.asarray(value, np.float32)
    shapes = {name: value.shape for name, value in arrays.items()}
    tensors = weights.Tensors(shapes, arrays.__getitem__)
    return Weights(size, tensors, tokenizer, {"source": "random", "format": "clip_jax"})


def assert_same_weights(actual: Weights, expected: Weights):
    """Bit for bit, and everything that travels with them."""
    assert actual.size == expected.size
    assert actual.tensors.shapes == expected.tensors.shapes
    for name in expected.tensors.shapes:
        ours = actual.tensors.read(name)
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, expected.tensors.read(name), err_msg=name)


def make_batch(size: models.Size) -> tuple[np.ndarray, np.ndarray]:
    """Normalised images, and captions that end at different places."""
    rng = np.random.default_rng(1)
    images = rng.normal(size=(3, size.image_size, size.image_size, 3)).astype(np.float32)
    tokens = rng.integers(3, size.vocab_size - 2, (3, size.context_length)).astype(np.int32)
    if size.text_pool == "end":
        for row, length in zip(tokens, (4, 9, size.context_length)):
            row[length - 1 :] = 0
            row[0], row[length - 1] = size.vocab_size - 2, size.vocab_size - 1
    return images, tokens


def jax_outputs(ours: Weights, batch) -> dict:
    mesh = jax.make_mesh((1, 1, 1, 1), ("slice", "data", "fsdp", "tensor"))
    variables = weights.to_variables(ours, mesh)
    fast = {"xla_backend_optimization_level": 1}
    apply = jax.jit(models.CLIP(ours.size).apply, compiler_options=fast)
    image, text, *scalars = apply(variables, *batch)
    loss_fn = losses.sigmoid_loss if ours.size.logit_bias else losses.softmax_loss
    return {"image": image, "text": text, "loss": loss_fn(image, text, *scalars)}


def torch_loss(image, text, scale, bias=None) -> torch.Tensor:
    """Of unit vectors; scale is the multiplier."""
    logits = scale * image @ text.T
    if bias is not None:
        signs = 2 * torch.eye(len(logits)) - 1
        return -torch.nn.functional.logsigmoid(signs * (logits + bias)).sum() / len(logits)
    labels = torch.arange(len(logits))
    cross = torch.nn.functional.cross_entropy
    return (cross(logits, labels) + cross(logits.T, labels)) / 2


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def assert_agree(ours: dict, theirs: dict):
    for name in ("image", "text", "loss"):
        expected = theirs[name].detach().numpy()
        difference = np.abs(np.asarray(ours[name]) - expected).max()
        assert difference < TOLERANCE * np.abs(expected).max(), f"{name}: {difference:.1e}"


def to_torch(batch) -> tuple[torch.Tensor, torch.Tensor]:
    images, tokens = (torch.from_numpy(part) for part in batch)
    return images.permute(0, 3, 1, 2), tokens.long()


# ---- transformers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*VITS, *SIGLIPS])
def test_transformers(name: str, tmp_path: pathlib.Path):
    """Ours loaded there; then saved there, and loaded here."""
    size = models.get_size(name, (VITS | SIGLIPS)[name])
    ours = random_weights(size, convert.tokens.OPENAI if name in VITS else convert.tokens.UNKNOWN)
    convert.write(ours, tmp_path / "ours", "huggingface")
    model = transformers.AutoModel.from_pretrained(tmp_path / "ours").eval()
    batch = make_batch(size)
    images, tokens = to_torch(batch)
    with torch.no_grad():
        out = model(input_ids=tokens, pixel_values=images)
    image, text = unit(out.image_embeds), unit(out.text_embeds)
    bias = model.logit_bias if size.logit_bias else None
    theirs = {"image": image, "text": text}
    theirs["loss"] = torch_loss(image, text, model.logit_scale.exp(), bias)
    assert_agree(jax_outputs(ours, batch), theirs)

    model.save_pretrained(tmp_path / "theirs", max_shard_size="200MB")
    transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours").save_pretrained(
        tmp_path / "theirs"
    )
    assert_same_weights(convert.read(tmp_path / "theirs"), ours)


def test_transformers_tokenizer_and_processor(tmp_path: pathlib.Path):
    """Captions and pictures become the same numbers there."""
    ours = random_weights(
        models.get_size("ViT-B/32", SHORT | {"image_width": 64, "image_heads": 1})
    )
    convert.write(ours, tmp_path / "ours", "huggingface")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "ours")
    captions = ["a photo of a cat", "It's 2 dogs, isn't it?", "naïve café"]
    found = processor(text=captions, padding="max_length", return_tensors="np")["input_ids"]
    wanted = convert.create_tokenizer(ours.tokenizer, 77)(captions)
    ends = (wanted == 49_407).argmax(axis=1)
    for row, expected, end in zip(found, wanted, ends):
        np.testing.assert_array_equal(row[: end + 1], expected[: end + 1])
    picture = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    pixels = processor(images=[picture], return_tensors="np")["pixel_values"][0]
    expected = (picture / 255 - np.array(ours.size.image_mean)) / np.array(ours.size.image_std)
    np.testing.assert_allclose(pixels.transpose(1, 2, 0), expected, atol=1e-5)


# ---- open_clip ---------------------------------------------------------------------------------


def open_clip_outputs(model: torch.nn.Module, batch) -> dict:
    with torch.no_grad():
        image, text, scale, *bias = model.eval()(*to_torch(batch))
    return {"image": image, "text": text, "loss": torch_loss(image, text, scale, *bias)}


@pytest.mark.parametrize("name", [*RESNETS, "ViT-B/32", "ViT-H/14"])
def test_open_clip(name: str, tmp_path: pathlib.Path):
    size = models.get_size(name, RESNETS.get(name, SHORT))
    ours = random_weights(size)
    convert.write(ours, tmp_path / "ours", "open_clip")
    model = open_clip.create_model(f"local-dir:{tmp_path / 'ours'}")
    batch = make_batch(size)
    assert_agree(jax_outputs(ours, batch), open_clip_outputs(model, batch))

    (tmp_path / "theirs").mkdir()
    torch.save(model.state_dict(), tmp_path / "theirs" / "open_clip_pytorch_model.bin")
    settings = (tmp_path / "ours" / "open_clip_config.json").read_text()
    (tmp_path / "theirs" / "open_clip_config.json").write_text(settings)
    assert_same_weights(convert.read(tmp_path / "theirs"), ours)


@pytest.mark.parametrize("kind", ["base_patch16_siglip_224", "so400m_patch14_siglip_224"])
def test_open_clip_siglip(kind: str, tmp_path: pathlib.Path, monkeypatch):
    """Full width; timm's tower and ours shortened. timm has the exact GELU."""
    import timm

    short = functools.partial(timm.create_model, depth=2)
    monkeypatch.setattr("open_clip.timm_model.timm.create_model", short)
    known = convert.open_clip._TIMM
    part = kind.partition("_")[0]
    monkeypatch.setitem(known, part, (known[part][0], 2, *known[part][2:]))
    name = {"base": "SigLIP-B/16", "so400m": "SigLIP-So400m/14"}[part]
    shapes = {"image_layers": (2,), "text_layers": 1, "activation": "gelu"}
    size = models.get_size(name, shapes)
    ours = random_weights(size, convert.tokens.UNKNOWN)
    convert.write(ours, tmp_path / "ours", "open_clip")
    model = open_clip.create_model(f"local-dir:{tmp_path / 'ours'}")
    batch = make_batch(size)
    assert_agree(jax_outputs(ours, batch), open_clip_outputs(model, batch))
    assert_same_weights(convert.read(tmp_path / "ours"), ours)


def test_configs_of_open_clip():
    """Its own settings of our models give our sizes."""
    for name, theirs in (
        ("RN50x16", "RN50x16-quickgelu"),
        ("ViT-L/14@336px", "ViT-L-14-336-quickgelu"),
        ("ViT-H/14", "ViT-H-14"),
        ("ViT-g/14", "ViT-g-14"),
    ):
        config = {"model_cfg": open_clip.get_model_config(theirs)}
        assert convert.open_clip.size_of(config, theirs) == models.get_size(name)
    config = {"model_cfg": open_clip.get_model_config("ViT-SO400M-14-SigLIP")}
    config["preprocess_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    wanted = models.get_size("SigLIP-So400m/14", {"activation": "gelu"})
    assert convert.open_clip.size_of(config, "x") == wanted


# ---- OpenAI's code -----------------------------------------------------------------------------

OPENAI = {
    "ViT-B/32": {"image_size": 64, "image_width": 128, "image_heads": 2, **SHORT},
    "RN50": {"image_size": 64, "image_layers": (1, 2, 1, 1), "text_layers": 1},
}


def openai_model(state: dict) -> torch.nn.Module:
    """By OpenAI's own code, whose package does not import without an old setuptools."""
    path = importlib.metadata.distribution("openai-clip").locate_file("clip/model.py")
    spec = importlib.util.spec_from_file_location("clip_model", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build_model(state).float().eval()


@pytest.mark.parametrize("name", OPENAI)
def test_openai_state_dict_and_archive(name: str, tmp_path: pathlib.Path):
    size = models.get_size(name, OPENAI[name])
    ours = random_weights(size)
    half = {k: np.float16(ours.tensors.read(k)).astype(np.float32) for k in ours.tensors.shapes}
    tensors = weights.Tensors(ours.tensors.shapes, half.__getitem__)  # as fp16 can hold them
    ours = Weights(size, tensors, ours.tokenizer, ours.origin)
    convert.write(ours, tmp_path / "ours.pt", "openai")
    model = openai_model(torch.load(tmp_path / "ours.pt", weights_only=True))
    batch = make_batch(size)
    images, tokens = to_torch(batch)
    with torch.no_grad():
        image, text = unit(model.encode_image(images)), unit(model.encode_text(tokens))
    theirs = {"image": image, "text": text}
    theirs["loss"] = torch_loss(image, text, model.logit_scale.exp())
    assert_agree(jax_outputs(ours, batch), theirs)

    traced = torch.jit.trace(model, (images, tokens), check_trace=False)
    torch.jit.save(traced.half(), tmp_path / "theirs.pt")
    assert_same_weights(convert.read(tmp_path / "theirs.pt"), ours)
