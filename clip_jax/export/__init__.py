"""Exports that run with JAX or onnxruntime alone, model cards, and uploads to the hub.

`load` runs a StableHLO export and imports nothing but JAX and NumPy.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clip_jax.export.runtime import Exported

__all__ = ["load"]


def load(directory: str | os.PathLike[str]) -> "Exported":
    """Opens a folder of `python -m clip_jax export --format=stablehlo`, on the default device.

    Raises:
      UserError: a file is missing or damaged.
    """
    from clip_jax.export.runtime import Exported  # late, so that the commands' --help is instant

    return Exported(directory)
