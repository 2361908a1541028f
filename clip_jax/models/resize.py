"""Position embeddings for another resolution (paper section 2.5: 336 pixels) or context."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float

_IMAGE_POSITIONS = (("image", "positions"), ("image", "attention_pool", "positions"))


def resize_positions(params: Any, length: int) -> Any:
    """Interpolates the learned positions of the image tower, bicubic on their grid.

    Args:
      params: of a ViT or ResNet model.
      length: positions of the new resolution: a square grid, and one for the class or mean token
        where there is one.

    Returns:
      The same tree, its image positions [length, width].
    """
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(params)
    path = next(path for path in _IMAGE_POSITIONS if path in flat)
    tokens = len(flat[path]) - math.isqrt(len(flat[path])) ** 2  # a square plus one is no square
    token, grid = flat[path][:tokens], flat[path][tokens:]
    old, new = math.isqrt(len(grid)), math.isqrt(length - tokens)
    width = grid.shape[-1]
    grid = jax.image.resize(grid.reshape(old, old, width), (new, new, width), "bicubic")
    flat[path] = jnp.concatenate([token, grid.reshape(new * new, width)])
    return traverse_util.unflatten_dict(flat)


def image_positions(params: Any) -> Any:
    """Returns the learned positions of the image tower, array or shape."""
    flat = traverse_util.flatten_dict(params)
    return next(flat[path] for path in _IMAGE_POSITIONS if path in flat)


def resize_text_positions(
    positions: Float[Array, "old w"] | Float[np.ndarray, "old w"], length: int
) -> Float[Array, "{length} w"]:
    """Interpolates the learned positions of the text tower linearly."""
    shape = (length, positions.shape[-1])
    return jax.image.resize(jnp.asarray(positions), shape, "linear", antialias=False)
