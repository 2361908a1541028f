"""A model so small that the TPU compiler is done with its training step in seconds."""

import importlib.util

import pytest
from ml_collections import ConfigDict

from clip_jax.plan import topology
from configs import vit_b32

TINY = {
    "embed_dim": 16,
    "image_size": 16,
    "image_layers": (2,),
    "image_width": 32,
    "image_heads": 2,
    "patch_size": 8,
    "text_layers": 2,
    "text_width": 32,
    "text_heads": 2,
    "context_length": 8,
    "vocab_size": 64,
}
V5E_8 = topology.parse_topology("v5e:2x4")
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)


def tiny_config(**overrides) -> ConfigDict:
    """The smoke config with the tiny model; overrides by dotted name."""
    config = vit_b32.get_config("smoke").unlock()
    config.model.size.update(TINY)
    config.model.pack.length = 0
    config.mesh.zero1 = False
    config.update_from_flattened_dict(overrides)
    return config


def check_paragraph(text: str) -> None:
    """What a mistake is answered with."""
    assert "\n" not in text.strip()
    assert 30 < len(text) < 700
    assert text.strip().endswith((".", "..."))
    assert "Traceback" not in text
