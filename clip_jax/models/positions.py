"""Fixed position embeddings of the patches of an image."""

import numpy as np
from jaxtyping import Float32

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
