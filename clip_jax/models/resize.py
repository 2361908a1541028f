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
      params: parameters of a ViT or ResNet model.
      length: number of positions at the new resolution: a square grid, and those of the class or
        mean token and of registers where there are any.

    Returns:
      A tree whose image positions are [length, width].
    """
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(params)
    path = next(path for path in _IMAGE_POSITIONS if path in flat)
    # A square plus up to twice its side is no square; `Size` allows no more tokens before patches.
    tokens = len(flat[path]) - math.isqrt(len(flat[path])) ** 2
    token, grid = flat[path][:tokens], flat[path][tokens:]
    old, new = math.isqrt(len(grid)), math.isqrt(length - tokens)
    width = grid.shape[-1]
    grid = jax.image.resize(grid.reshape(old, old, width), (new, new, width), "bicubic")
    flat[path] = jnp.concatenate([token, grid.reshape(new * new, width)])
    return traverse_util.unflatten_dict(flat)


def image_positions(params: Any) -> Any | None:
    """Returns the learned positions of the image tower, array or shape; None: they are fixed."""
    flat = traverse_util.flatten_dict(params)
    return next((flat[path] for path in _IMAGE_POSITIONS if path in flat), None)


def resize_text_positions(
    positions: Float[Array | np.ndarray, "old width"], length: int
) -> Float[Array, "{length} width"]:
    """Interpolates the learned positions of the text tower linearly."""
    shape = (length, positions.shape[-1])
    return jax.image.resize(jnp.asarray(positions), shape, "linear", antialias=False)
