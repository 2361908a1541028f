"""Weights of open_clip, converted there and back through folders: same weights, same numbers.

Random weights; it loads what is written here, and gives the same embeddings and loss.
"""

import dataclasses
import functools
import pathlib

import pytest
from parity import (  # or skips
    SHORT_RESNET,
    SHORT_VIT,
    assert_agree,
    assert_same_weights,
    jax_outputs,
    make_batch,
    random_weights,
    to_torch,
    torch,
    torch_outputs,
)

from clip_jax import models, weights
from clip_jax.errors import UserError
from clip_jax.weights.convert import timm_towers
from clip_jax.weights.convert.open_clip_settings import size_of
from clip_jax.weights.model import Weights

open_clip = pytest.importorskip("open_clip")

PAPER = [name for name in models.available_models() if name.startswith(("RN", "ViT"))]


def assert_there_and_back(ours: Weights, folder: pathlib.Path):
    """Ours loaded there; then saved there, and loaded here."""
    weights.save(ours, folder / "ours", "open_clip")
    model = open_clip.create_model(f"local-dir:{folder / 'ours'}").eval()
    batch = make_batch(ours.size)
    with torch.no_grad():
        theirs = torch_outputs(*model(*to_torch(batch)))
    assert_agree(jax_outputs(ours, batch), theirs)

    (folder / "theirs").mkdir()
    torch.save(model.state_dict(), folder / "theirs" / "open_clip_pytorch_model.bin")
    settings = (folder / "ours" / "open_clip_config.json").read_text()
    (folder / "theirs" / "open_clip_config.json").write_text(settings)
    assert_same_weights(weights.open(folder / "theirs"), ours)


@pytest.mark.parametrize("name", PAPER)
def test_there_and_back(name: str, tmp_path: pathlib.Path):
    size = models.get_size(name, SHORT_RESNET if name.startswith("RN") else SHORT_VIT)
    assert_there_and_back(random_weights(size), tmp_path)


CLIPA = ["ViT-L-14-CLIPA", "ViT-H-14-CLIPA-336", "ViT-bigG-14-CLIPA"]
# Settings of our models that no model of its list has.
FORMS = [
    {"image_positions": "sincos", "image_size": 84},
    {"norm_after_pool": False, "pre_norm": True, "text_pool": "first"},
    {"text_projection": False},
    {"text_pool": "end", "end_token": 900},
]


def clipa(name: str, changes: dict) -> models.Size:
    """Returns a model of its list, shortened and changed."""
    config = {"model_cfg": open_clip.get_model_config(name)}
    config["preprocess_cfg"] = {"resize_mode": "squash", "interpolation": "bilinear"}
    return dataclasses.replace(size_of(config, name), **SHORT_VIT, **changes)


@pytest.mark.parametrize("name", CLIPA)
def test_clipa_there_and_back(name: str, tmp_path: pathlib.Path):
    """Its class token is attended to, and the mean of the patches read."""
    assert_there_and_back(random_weights(clipa(name, {})), tmp_path)


@pytest.mark.parametrize("forms", FORMS)
def test_forms_there_and_back(forms: dict, tmp_path: pathlib.Path):
    assert_there_and_back(random_weights(clipa("ViT-L-14-CLIPA", forms)), tmp_path)


def test_fixed_positions_are_compared(tmp_path: pathlib.Path):
    """Those of the authors' JAX code differ from open_clip's formula."""
    ours = random_weights(clipa("ViT-L-14-CLIPA", {"image_positions": "sincos"}))
    weights.save(ours, tmp_path / "ours", "open_clip")
    model = open_clip.create_model(f"local-dir:{tmp_path / 'ours'}")
    with torch.no_grad():
        model.visual.positional_embedding[7] += 0.01
    (tmp_path / "ours" / "open_clip_model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "ours" / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match=r"pos_embed_type = 'sin_cos_2d'.*'learnable'"):
        weights.open(tmp_path / "ours")
    path = tmp_path / "ours" / "open_clip_config.json"
    path.write_text(path.read_text().replace("sin_cos_2d", "learnable"))
    assert weights.open(tmp_path / "ours").size.image_positions == "learned"


def shorten_timm(monkeypatch):
    """Gives timm's towers two blocks."""
    import timm

    short = functools.partial(timm.create_model, depth=2)
    monkeypatch.setattr("open_clip.timm_model.timm.create_model", short)


@pytest.mark.parametrize(
    "name", ["ViT-B-16-SigLIP2", "ViT-L-16-SigLIP2-512", "ViT-gopt-16-SigLIP2-256"]
)
def test_siglip_2_there_and_back(name: str, tmp_path: pathlib.Path, monkeypatch):
    """timm's base tower has the exact GELU, beside a text tower with its approximation."""
    shorten_timm(monkeypatch)
    shapes = {kind: (width, 2, *rest) for kind, (width, _, *rest) in timm_towers._SHAPES.items()}
    monkeypatch.setattr(timm_towers, "_SHAPES", shapes)
    config = {"model_cfg": open_clip.get_model_config(name)}
    config["preprocess_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    size = size_of(config, name)
    assert size.vocab_size == 256_000
    exact = name == "ViT-B-16-SigLIP2"
    assert (size.activation, size.text_activation) == (
        ("gelu", "gelu_tanh") if exact else ("gelu_tanh", None)
    )
    short = {"text_layers": 1, "vocab_size": 1000}
    assert_there_and_back(random_weights(dataclasses.replace(size, **short)), tmp_path)


@pytest.mark.parametrize("kind", ["base_patch16_siglip_224", "so400m_patch14_siglip_224"])
def test_siglip_there_and_back(kind: str, tmp_path: pathlib.Path, monkeypatch):
    """Full width; timm's tower and ours shortened. timm has the exact GELU."""
    shorten_timm(monkeypatch)
    part = kind.partition("_")[0]
    shapes = timm_towers._SHAPES
    monkeypatch.setitem(shapes, part, (shapes[part][0], 2, *shapes[part][2:]))
    name = {"base": "SigLIP-B/16", "so400m": "SigLIP-So400m/14"}[part]
    size = models.get_size(name, SHORT_VIT | {"image_layers": (2,), "activation": "gelu"})
    assert_there_and_back(random_weights(size), tmp_path)


def test_its_own_settings_of_our_models():
    """Its own settings of our models give our sizes."""
    for name, theirs in (
        ("RN50x16", "RN50x16-quickgelu"),
        ("ViT-L/14@336px", "ViT-L-14-336-quickgelu"),
        ("ViT-H/14", "ViT-H-14"),
        ("ViT-g/14", "ViT-g-14"),
    ):
        config = {"model_cfg": open_clip.get_model_config(theirs)}
        assert size_of(config, theirs) == models.get_size(name)
    config = {"model_cfg": open_clip.get_model_config("ViT-SO400M-14-SigLIP")}
    config["preprocess_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    wanted = models.get_size("SigLIP-So400m/14", {"activation": "gelu"})
    assert size_of(config, "x") == wanted
