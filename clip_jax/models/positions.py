"""Fixed positions of the patches of an image: sines and cosines, or rotations."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

# Cosine and sine of the angle of each pair of channels of each token.
Rotations = Float[Array, "#batch tokens pairs 2"]

_BASE = 10_000.0


def frequencies(count: int) -> np.ndarray:
    """Returns angular frequencies from 1 down, in a geometric series towards 1 / 10,000."""
    return _BASE ** -(np.arange(count) / count)


def grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the column and the row of each patch, [side**2] each, row by row."""
    rows, columns = np.divmod(np.arange(side**2), side)
    return columns, rows


def sincos(side: int, width: int) -> Float32[np.ndarray, "{side}*{side} {width}"]:
    """Returns the positions of MoCo v3 (Chen et al. 2021): sines and cosines of column, then row.

    Args:
      side: patches along a side.
      width: channels, a multiple of 4.
    """
    parts = []
    for coordinate in grid(side):
        angles = coordinate[:, None] * frequencies(width // 4)
        parts += [np.sin(angles), np.cos(angles)]
    return np.concatenate(parts, axis=1, dtype=np.float32, casting="same_kind")


def rotations(side: int, channels: int, tokens: int) -> Float32[np.ndarray, "1 length pairs 2"]:
    """Returns the rotations of axial RoPE: half of the pairs turn with the column, half the row.

    Tokens before the patches, at the origin, are not turned; the first patch then lies at (1, 1).

    Args:
      side: patches along a side.
      channels: those of a head, a multiple of 4.
      tokens: number of tokens before the patches.
    """
    start = int(tokens > 0)
    angles = [(start + at)[:, None] * frequencies(channels // 4) for at in grid(side)]
    angles = np.pad(np.concatenate(angles, axis=1), ((tokens, 0), (0, 0)))
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)[None]


def rotate(
    x: Float[Array, "batch tokens heads channels"], by: Rotations
) -> Float[Array, "batch tokens heads channels"]:
    """Turns each pair of neighbouring channels, in float32 whatever their dtype."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    cosine, sine = by[:, :, None, :, 0], by[:, :, None, :, 1]
    turned = jnp.stack([first * cosine - second * sine, first * sine + second * cosine], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
