"""A model whose training step the TPU compiler finishes in seconds."""

import importlib.util

import jax.extend
import numpy as np
import pytest
from ml_collections import ConfigDict

from clip_jax.configs import vit_b32
from clip_jax.models.sizes import Size
from clip_jax.plan import topology

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
    config.model.packing.length = 0
    config.model.attention = "xla"  # a kernel would pad these few tokens
    config.mesh.zero1 = False
    config.update_from_flattened_dict(overrides)
    return config


def check_paragraph(text: str) -> None:
    """Checks that a message is one plain paragraph."""
    assert "\n" not in text.strip()
    assert 30 < len(text) < 700
    assert text.strip().endswith((".", "..."))
    assert "Traceback" not in text


def unread_flops(size: Size) -> float:
    """Counts the operations of one pair that `models.flops` includes, but no program executes.

    They belong to tokens of the last layer that are not read: all that follows attention, and their
    queries where attention is not causal.
    """
    total = 0.0
    if size.has_class_token and not size.text_decoder_layers:
        others, width = size.image_tokens - 1, size.image_width
        unread = 2.0 * others * width * (2 * width + 2 * size.image_mlp)
        unread += 4.0 * others * (others + 1) * width
        total += unread * (2 if size.objective == "near_duplicates" else 1)
    all_read = size.text_decoder_layers > 0 and not size.text_decoder_shared
    all_read = all_read or size.text_pool in ("avg", "map")
    if size.objective == "contrastive" and size.text_layers and not all_read:
        others, width = size.context_length - 1, size.text_width
        total += 2.0 * others * width * (width + 2 * size.text_mlp)
    return total


def jaxpr_flops(jaxpr) -> float:
    """Counts the products and convolutions of a traced program, and a `while` loop once."""
    total = 0.0
    for eqn in jaxpr.eqns:
        out = eqn.outvars[0].aval
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * out.size * np.prod([shape[d] for d in contracted])
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            total += 2 * out.size * np.prod(kernel[:-1])
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            total += times * jaxpr_flops(inner)
    return total
