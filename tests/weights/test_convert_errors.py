"""Refusals to convert, whose messages name what is wrong."""

import dataclasses
import io
import json
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import tiny_weights
from etils import epath

from clip_jax import models, weights
from clip_jax.errors import UserError
from clip_jax.weights.convert import cli, files, formats, openai, torch_files
from clip_jax.weights.model import Tensors


def pickled_file(path: pathlib.Path, value: object) -> pathlib.Path:
    """A file as PyTorch packs it, around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value, protocol=2))
    return path


class Harmful:
    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path("harm"),))


@pytest.mark.parametrize("where", ["top", "state_dict"])
def test_a_pickle_with_code_is_refused(where: str, tmp_path: pathlib.Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value = Harmful() if where == "top" else {"state_dict": {"weight": Harmful()}}
    path = pickled_file(tmp_path / "model.pt", value)
    with pytest.raises(UserError, match=r"model.pt is refused.*getattr, which could run code"):
        weights.open(path, model="ViT-B/32")
    assert not (tmp_path / "harm").exists()
    with zipfile.ZipFile(path) as archive:  # it would have done harm
        pickle.load(io.BytesIO(archive.read("archive/data.pkl")))
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["builtins.eval", "os.system", "torch.load", "numpy.load"])
def test_only_known_names_are_unpickled(name: str, tmp_path: pathlib.Path):
    module, _, function = name.rpartition(".")
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("x/data.pkl", f"c{module}\n{function}\n.".encode())
    with pytest.raises(UserError, match=rf"asks for {name}"):
        weights.open(tmp_path / "x.bin", model="RN50")


def test_damaged_torch_files(tmp_path: pathlib.Path):
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match=r"no file of PyTorch 1.6 or later"):
        weights.open(path, model="RN50")
    ours = tiny_weights.make("vit")
    torch_files.write(files.export(openai.table(ours.size), ours), path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"cut short"):
        weights.open(path, model="RN50")


def test_a_tensor_beyond_its_storage(tmp_path: pathlib.Path):
    """Whatever shape the pickle claims, only the storage is read."""
    arrays = {"a": np.arange(4, dtype=np.float32)}
    path = tmp_path / "x.pt"
    torch_files.write(Tensors({"a": (2, 400)}, lambda name: arrays[name]), path)
    found = torch_files.read(epath.Path(path)).tensors
    with pytest.raises((TypeError, ValueError), match="buffer"):
        found.read("a")


# ---- Another architecture ----------------------------------------------------------------------


def edited(folder: pathlib.Path, change) -> pathlib.Path:
    """A folder of transformers, its tensors changed in place."""
    weights.save(tiny_weights.make("vit"), folder, "huggingface")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def test_the_first_tensor_of_another_shape(tmp_path: pathlib.Path):
    def change(tensors: dict):
        tensors["text_projection.weight"] = np.zeros((5, 64), np.float32)

    match = r"another architecture: its text_projection.weight is \[5, 64\].*has \[32, 64\]"
    with pytest.raises(UserError, match=match):
        weights.open(edited(tmp_path / "x", change))


def test_missing_and_superfluous_tensors_are_listed(tmp_path: pathlib.Path):
    def change(tensors: dict):
        tensors["adapter.weight"] = tensors.pop("visual_projection.weight")

    match = r"lacks 1 tensor\(s\) \(visual_proj.*has besides 1 tensor\(s\) \(adapter.weight\)"
    with pytest.raises(UserError, match=match):
        weights.open(edited(tmp_path / "x", change))


def test_nan_is_named(tmp_path: pathlib.Path):
    def change(tensors: dict):
        tensors["text_projection.weight"][3, 4] = np.nan

    found = weights.open(edited(tmp_path / "x", change))
    with pytest.raises(UserError, match=r"text_projection.weight holds 1 values of 2,048.*NaN"):
        weights.save(found, tmp_path / "y")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]  # nothing half written


def test_a_bare_state_dict_must_be_named(tmp_path: pathlib.Path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(1, np.float32)}, path)
    with pytest.raises(UserError, match=r"bare list of tensors.*--model.*RN50"):
        weights.open(path)
    with pytest.raises(UserError, match=r"lacks 302 tensor\(s\).* has besides 1 tensor\(s\) \(a\)"):
        weights.open(path, model="ViT-B/32")


# ---- Settings that contradict ------------------------------------------------------------------


def edit_json(path: pathlib.Path, **changes):
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *parents, last = name.split("__")
        node = content
        for parent in parents:
            node = node[parent]
        node[last] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "changes", "match"),
    [
        ("preprocessor_config.json", {"crop_size": 48}, "crop_size .*48.*image_size 32"),
        ("preprocessor_config.json", {"resample": 0}, "Pillow's filter 0 .resample"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 40}}, "size .*40.*then the middle"),
        ("preprocessor_config.json", {"size": {"longest_edge": 32}}, "size .*longest_edge"),
        ("preprocessor_config.json", {"do_center_crop": False}, "shortest_edge.*without a crop"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize=False"),
        ("preprocessor_config.json", {"do_pad": True}, "do_pad=True"),
        ("preprocessor_config.json", {"do_convert_rgb": False}, "do_convert_rgb=False"),
        ("preprocessor_config.json", {"rescale_factor": 0}, "rescale_factor=0"),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5]}, r"image_mean=\[0.5, 0.5\]"),
        (
            "preprocessor_config.json",
            {"image_processor_type": "ViTImageProcessor"},
            "transformers' ViTImageProcessor",
        ),
        ("config.json", {"text_config__hidden_act": "relu"}, "hidden_act='relu'.*quick_gelu"),
        ("config.json", {"text_config__layer_norm_eps": 1e-3}, "layer_norm_eps 0.001"),
        ("vocab.json", {"dog</w>": 7}, r"damaged: its 49,408 entries do not have the ids"),
        ("config.json", {"vision_config__num_hidden_layers": 3}, r"lacks 16 tensor.*layers\.2"),
    ],
)
def test_a_folder_that_contradicts_itself(file, changes, match, tmp_path: pathlib.Path):
    weights.save(tiny_weights.make("vit"), tmp_path / "x", "huggingface")
    edit_json(tmp_path / "x" / file, **changes)
    with pytest.raises(UserError, match=match):
        weights.open(tmp_path / "x")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_cfg__text_cfg__hf_model_name": "roberta"}, "text_cfg.hf_model_name = 'roberta'"),
        ({"model_cfg__vision_cfg__attentional_pool": True}, "vision_cfg.attentional_pool = True"),
        ({"model_cfg__vision_cfg__timm_model_name": "convnext"}, "image tower convnext of timm"),
        ({"preprocess_cfg__interpolation": "random"}, "interpolation 'random'"),
        ({"preprocess_cfg__resize_mode": "longest"}, "resize_mode 'longest'"),
        ({"preprocess_cfg__mode": "L"}, "mode 'L'"),
        ({"preprocess_cfg__gamma": 2}, "preprocess_cfg.gamma = 2"),
        ({"model_cfg__vision_cfg__norm_kwargs": {"eps": 1e-3}}, "eps 1e-05 in its text"),
        (
            {"model_cfg__text_cfg__norm_kwargs": {"elementwise_affine": False}},
            "norm_kwargs .'elementwise_affine'",
        ),
        (
            {
                "model_cfg__quick_gelu": True,
                "model_cfg__vision_cfg__act_kwargs": {"approximate": "tanh"},
            },
            "with quick_gelu",
        ),
        ({"model_cfg__vision_cfg__pool_type": "none"}, "pool_type = 'none'.*tok, avg"),
        ({"model_cfg__vision_cfg__pos_embed_type": "rope"}, "pos_embed_type = 'rope'"),
        ({"model_cfg__text_cfg__pool_type": "map"}, "pool_type = 'map'.*argmax, eos, first, last"),
        ({"model_cfg__text_cfg__proj_type": "mlp"}, "proj_type = 'mlp'.*linear, none"),
    ],
)
def test_unknown_settings_of_open_clip(changes, match, tmp_path: pathlib.Path):
    weights.save(tiny_weights.make("gelu"), tmp_path / "x", "open_clip")
    edit_json(tmp_path / "x" / "open_clip_config.json", **changes)
    with pytest.raises(UserError, match=match):
        weights.open(tmp_path / "x")


def test_another_model_than_named(tmp_path: pathlib.Path):
    weights.save(tiny_weights.make("gelu"), tmp_path / "x")
    with pytest.raises(UserError, match=r"not ViT-B/32: it has.*activation 'gelu', not 'quick_gel"):
        weights.open(tmp_path / "x", model="ViT-B/32")
    assert weights.open(tmp_path / "x", activation="quick_gelu").size.activation == "quick_gelu"


def test_a_damaged_description(tmp_path: pathlib.Path):
    weights.save(tiny_weights.make("vit"), tmp_path / "x")
    (tmp_path / "x" / "clip_jax.json").write_text('{"size": {}}')
    with pytest.raises(UserError, match=r"clip_jax.json cannot be read as the description"):
        weights.open(tmp_path / "x")


# ---- What a format has no place for ------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "to", "match"),
    [
        ("resnet", "huggingface", "no CLIP with a ResNet"),
        ("gelu", "openai", "activation 'gelu', not 'quick_gelu'"),
        ("siglip", "openai", "image_pool 'map', not 'class'"),
        ("siglip", "open_clip", "no image tower like that"),
        ("vit", "big_vision", "two towers are SigLIP's"),
    ],
)
def test_formats_without_such_a_model(kind, to, match, tmp_path: pathlib.Path):
    with pytest.raises(UserError, match=match):
        weights.save(tiny_weights.make(kind), tmp_path / f"x{formats.FORMATS[to].suffix}", to)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "forms",
    [
        {"activation": "swiglu"},
        {"text_activation": "swiglu"},
        {"norm": "rms"},
        {"text_pool": "map", "text_causal": False},
    ],
)
def test_towers_that_only_our_format_has(forms, tmp_path: pathlib.Path):
    size = dataclasses.replace(tiny_weights.SIZES["vit"], **forms)
    ours = tiny_weights.make("vit", size)
    for to in ("openai", "open_clip", "huggingface", "big_vision"):
        with pytest.raises(UserError, match=f"{to} has no such model.*--to=clip_jax"):
            weights.save(ours, tmp_path / f"x{formats.FORMATS[to].suffix}", to)
    weights.save(ours, tmp_path / "x")
    tiny_weights.assert_same(weights.open(tmp_path / "x"), ours)


def test_published_siglip_in_open_clip_needs_another_activation(tmp_path: pathlib.Path):
    """timm's tower has the exact GELU."""
    size = models.get_size("SigLIP-B/16")
    ours = dataclasses.replace(tiny_weights.make("siglip"), size=size)
    with pytest.raises(UserError, match=r"activation 'gelu_tanh', not 'gelu'.*--activation"):
        weights.save(ours, tmp_path / "x", "open_clip")


def test_targets(tmp_path: pathlib.Path):
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match="is there already"):
        weights.save(tiny_weights.make("vit"), tmp_path / "x")
    with pytest.raises(UserError, match=r"end in .pt: call the target .*y.pt"):
        weights.save(tiny_weights.make("vit"), tmp_path / "y", "openai")
    with pytest.raises(UserError, match=r"https:// is not read.*gs://BUCKET"):
        weights.save(tiny_weights.make("vit"), "https://example.org/x")


@pytest.mark.parametrize("to", formats.FORMATS)
def test_what_breaks_off_leaves_nothing(to: str, tmp_path: pathlib.Path):
    ours = tiny_weights.make("siglip" if to == "big_vision" else "vit")
    last = list(ours.tensors.shapes)[-1]

    def read(name: str) -> np.ndarray:
        value = ours.tensors.read(name)
        return np.full_like(value, np.nan) if name == last else value

    broken = dataclasses.replace(ours, tensors=Tensors(ours.tensors.shapes, read))
    with pytest.raises(UserError, match="NaN or infinite"):
        weights.save(broken, tmp_path / f"x{formats.FORMATS[to].suffix}", to)
    assert not list(tmp_path.iterdir())


def test_sources(tmp_path: pathlib.Path):
    (tmp_path / "notes.txt").write_text("")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UserError, match=r"no model that can be read.*workdir.*big_vision"):
            weights.open(path)
    for path in ("https://example.org/model.pt", "hf://someone/tiny-clip", "gs:/bucket/model"):
        with pytest.raises(UserError, match=r"cannot be used: .*Paths are local, gs://BUCKET"):
            weights.open(path)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--to=pytorch", "no format 'pytorch' to convert to: take one of clip_jax, huggingface"),
        ("--activation=relu", "activation is 'relu': it takes one of quick_gelu, gelu, gelu_tanh"),
    ],
)
def test_choices_of_the_command(flag: str, message: str, tmp_path: pathlib.Path, capsys):
    weights.save(tiny_weights.make("vit"), tmp_path / "x")
    with pytest.raises(SystemExit, match="2"):
        cli.main([str(tmp_path / "x"), str(tmp_path / "y"), flag])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "y").exists()


def test_the_command_says_it_in_a_paragraph(tmp_path: pathlib.Path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(tmp_path / "nowhere"), str(tmp_path / "x")])
    assert ended.value.code == 2
    assert "There is no" in capsys.readouterr().err
