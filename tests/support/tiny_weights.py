"""Random weights of models so small that a test can convert them many times."""

import numpy as np

from clip_jax import models
from clip_jax.weights.convert import tokens
from clip_jax.weights.model import Tensors, Weights, variable_shapes

_TEXT = {"embed_dim": 32, "text_width": 64, "text_heads": 1, "text_layers": 2, "context_length": 10}
_VIT = {"image_size": 32, "image_layers": (2,), "image_width": 64, "image_heads": 1}
_CLIPA = {"activation": "gelu", "pre_norm": False, "image_pool": "avg", "norm_after_pool": True}
_CLIPA |= {"image_registers": 1, "text_pool": "last", "text_causal": False}
SIZES = {
    "vit": models.get_size("ViT-B/32", _TEXT | _VIT | {"patch_size": 8}),
    "gelu": models.get_size("ViT-H/14", _TEXT | _VIT | {"patch_size": 8, "image_mlp": 100}),
    "clipa": models.get_size(
        "ViT-B/32",
        _TEXT | _VIT | _CLIPA | {"patch_size": 8, "text_activation": "gelu_tanh"},
    ),
    "resnet": models.get_size(
        "RN50",
        {**_TEXT, "image_size": 64, "image_layers": (1, 2, 1, 1), "image_width": 8}
        | {"image_heads": 4},
    ),
    "siglip": models.get_size(
        "SigLIP-B/16",
        {**_TEXT, **_VIT, "embed_dim": 64, "image_heads": 4, "patch_size": 8, "vocab_size": 60},
    ),
}


def make(kind: str, size: models.Size | None = None) -> Weights:
    """Random weights, also of another size than the kind's; OpenAI's tokenizer but for SigLIP."""
    size, rng = size or SIZES[kind], np.random.default_rng(0)
    shapes = variable_shapes(size)
    arrays = {}
    for name, shape in shapes.items():
        value = rng.normal(0, 0.3, shape).astype(np.float32)
        if name.endswith(("scale", "var")):
            value = np.abs(value) + np.float32(0.5)
        arrays[name] = np.asarray(value)  # else a scalar where there are no axes
    tokenizer = tokens.UNKNOWN if kind == "siglip" else tokens.OPENAI
    tensors = Tensors(shapes, arrays.__getitem__)
    return Weights(size, tensors, tokenizer, {"source": "random", "format": "clip_jax"})


def assert_same(actual: Weights, expected: Weights) -> None:
    """Bit for bit, and everything that travels with them."""
    assert actual.size == expected.size
    assert (actual.tokenizer.name, actual.tokenizer.identity) == (
        expected.tokenizer.name,
        expected.tokenizer.identity,
    )
    assert actual.tensors.shapes == expected.tensors.shapes
    for name, shape in expected.tensors.shapes.items():
        ours = actual.tensors.read(name)
        assert (ours.dtype, ours.shape) == (np.float32, shape)
        np.testing.assert_array_equal(ours, expected.tensors.read(name), err_msg=name)
