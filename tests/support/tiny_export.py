"""Models of each kind, and batches for them, for the tests of exports."""

import dataclasses
from typing import Any

import jax
import numpy as np
import tiny_weights
from flax import traverse_util

from clip_jax import models
from clip_jax.weights.model import Tensors, TokenizerFile, Weights, variable_shapes

TOWERS = ("encode_image", "encode_text")
# 256 patches: the class token stands apart from them.
TILES = {"image_size": 64, "patch_size": 4, "image_layers": (1,)}


def weights(kind: str) -> Weights:
    """Random ones of "vit", "tiles" (a ViT whose class token stands apart), "resnet", "siglip"."""
    made = tiny_weights.make("vit" if kind == "tiles" else kind)
    made = dataclasses.replace(made, tokenizer=TokenizerFile("openai", "openai-bpe:0123"))
    if kind != "tiles":
        return made
    size = dataclasses.replace(made.size, **TILES)
    rng, shapes = np.random.default_rng(0), variable_shapes(size)
    arrays = {
        name: np.asarray(rng.normal(0, 0.2, shape), np.float32) for name, shape in shapes.items()
    }
    return dataclasses.replace(made, size=size, tensors=Tensors(shapes, arrays.__getitem__))


def arrays(weights: Weights) -> dict[str, np.ndarray]:
    """Reads arrays by name, such as "params/text/positions"."""
    return {name: weights.tensors.read(name) for name in weights.tensors.shapes}


def embed(weights: Weights, tower: str, rows: np.ndarray) -> np.ndarray:
    """The answer of the module itself."""
    variables: Any = traverse_util.unflatten_dict(arrays(weights), sep="/")
    net = models.CLIP(weights.size)
    found = np.asarray(jax.jit(lambda v, x: net.apply(v, x, method=tower))(variables, rows))
    assert np.ptp(found, axis=0).max() > 0.01  # else there is nothing to compare
    return found


def rows(size: models.Size, tower: str, count: int) -> np.ndarray:
    """Pixels uint8 [count, size, size, 3], or tokens int32 [count, context], each with its end."""
    rng = np.random.default_rng(count)
    if tower == "encode_image":
        shape = (count, size.image_size, size.image_size, 3)
        return rng.integers(0, 256, shape, np.uint8)
    tokens = rng.integers(1, size.vocab_size - 1, (count, size.context_length))
    tokens[np.arange(count), rng.integers(2, size.context_length, count)] = size.vocab_size - 1
    return tokens.astype(np.int32)
