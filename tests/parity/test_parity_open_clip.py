"""Weights of open_clip, converted there and back through folders: same weights, same numbers.

Random weights; it loads what is written here, and gives the same embeddings and loss.
"""

import dataclasses
import functools
import pathlib

import numpy as np
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
from clip_jax.weights.convert import files, openai, timm_towers, torch_files
from clip_jax.weights.convert.open_clip_settings import size_of
from clip_jax.weights.model import Weights

open_clip = pytest.importorskip("open_clip")
pretrained = pytest.importorskip("open_clip.pretrained")

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


def open_clip_size(name: str, monkeypatch) -> models.Size:
    """Returns a model of its list with an image tower of timm's, of two blocks."""
    shapes = {kind: (width, 2, *rest) for kind, (width, _, *rest) in timm_towers._SHAPES.items()}
    monkeypatch.setattr(timm_towers, "_SHAPES", shapes)
    config = {"model_cfg": open_clip.get_model_config(name)}
    config["preprocess_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    return size_of(config, name)


CLIPA = ["ViT-L-14-CLIPA", "ViT-H-14-CLIPA-336", "ViT-bigG-14-CLIPA"]
# Settings of our models that no model of its list has.
FORMS = [
    {"image_positions": "sincos", "image_size": 84},
    {"norm_after_pool": False, "pre_norm": True, "text_pool": "first"},
    {"text_projection": False},
    {"image_layer_scale": 1e-4, "image_qk_norm": True, "text_qk_norm": True},
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


PE = ["PE-Core-T-16-384", "PE-Core-B-16", "PE-Core-L-14-336", "PE-Core-bigG-14-448"]


@pytest.mark.parametrize("name", PE)
def test_pe_there_and_back(name: str, tmp_path: pathlib.Path, monkeypatch):
    """Rotated queries and keys, a head with its own heads, a projection with bias."""
    shorten_timm(monkeypatch)
    size = open_clip_size(name, monkeypatch)
    assert (size.image_registers, size.map_heads) == (int("bigG" not in name), 8)
    short = {"text_layers": 1, "vocab_size": 1000}
    assert_there_and_back(random_weights(dataclasses.replace(size, **short)), tmp_path)


@pytest.mark.parametrize(
    "name", ["ViT-B-16-SigLIP2", "ViT-L-16-SigLIP2-512", "ViT-gopt-16-SigLIP2-256"]
)
def test_siglip_2_there_and_back(name: str, tmp_path: pathlib.Path, monkeypatch):
    """timm's base tower has the exact GELU, beside a text tower with its approximation."""
    shorten_timm(monkeypatch)
    size = open_clip_size(name, monkeypatch)
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


def test_its_own_settings_of_published_models():
    for name, theirs, cfg in (
        ("CLIPA-L/14", "ViT-L-14-CLIPA", pretrained._apcfg()),
        ("CLIPA-H/14", "ViT-H-14-CLIPA", pretrained._apcfg()),
        ("MetaCLIP2-H/14", "ViT-H-14-worldwide-quickgelu", pretrained._pcfg()),
        ("PE-Core-B/16", "PE-Core-B-16", pretrained._pecfg()),
        ("PE-Core-L/14@336px", "PE-Core-L-14-336", pretrained._pecfg()),
    ):
        prepared = {
            key: cfg[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in cfg
        }
        config = {"model_cfg": open_clip.get_model_config(theirs), "preprocess_cfg": prepared}
        wanted = models.get_size(name)
        if wanted.image_rope:
            wanted = dataclasses.replace(wanted, image_projection_bias=True)
        assert size_of(config, theirs) == wanted


def test_the_authors_pe(tmp_path: pathlib.Path, monkeypatch):
    """A state dict in the names of its authors, against timm's conversion of them."""
    import timm
    from timm.models.eva import checkpoint_filter_fn

    size = models.get_size("PE-Core-B/16", SHORT_VIT | {"image_layers": (2,)})
    ours = random_weights(size)
    theirs = files.export(openai.table(size), ours)
    torch_files.write(theirs, tmp_path / "pe.pt")
    monkeypatch.setitem(models.sizes.SIZES, "PE-Core-B/16", size)
    assert_same_weights(weights.open(tmp_path / "pe.pt", model="PE-Core-B/16"), ours)
    tower = timm.create_model("vit_pe_core_base_patch16_224", depth=2, num_classes=1024).eval()
    names = {name: torch.from_numpy(np.array(theirs.read(name))) for name in theirs.shapes}
    tower.load_state_dict(checkpoint_filter_fn(names, tower))
    batch = make_batch(size)
    with torch.no_grad():
        found = tower(to_torch(batch)[0])
    found = (found / found.norm(dim=-1, keepdim=True)).numpy()
    np.testing.assert_allclose(jax_outputs(ours, batch)["image"], found, rtol=0, atol=1e-5)
    # open_clip's tower has a bias, here of zeros.
    shapes = {kind: (width, 2, *rest) for kind, (width, _, *rest) in timm_towers._SHAPES.items()}
    monkeypatch.setattr(timm_towers, "_SHAPES", shapes)
    weights.save(ours, tmp_path / "ours", "open_clip")
    found = weights.open(tmp_path / "ours")
    assert found.size == dataclasses.replace(size, image_projection_bias=True)
    assert not found.tensors.read("params/image/projection/bias").any()
