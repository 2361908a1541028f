"""Weights of open_clip, converted there and back through folders: same weights, same numbers.

Random weights; it loads what is written here, and gives the same embeddings and loss.
"""

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
from clip_jax.weights.convert.open_clip import _TIMM, size_of
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


@pytest.mark.parametrize("kind", ["base_patch16_siglip_224", "so400m_patch14_siglip_224"])
def test_siglip_there_and_back(kind: str, tmp_path: pathlib.Path, monkeypatch):
    """Full width; timm's tower and ours shortened. timm has the exact GELU."""
    import timm

    short = functools.partial(timm.create_model, depth=2)
    monkeypatch.setattr("open_clip.timm_model.timm.create_model", short)
    part = kind.partition("_")[0]
    monkeypatch.setitem(_TIMM, part, (_TIMM[part][0], 2, *_TIMM[part][2:]))
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
