"""A model for those who have only JAX, or only onnxruntime; its card; and the way to the hub.

`load` runs a StableHLO export and imports nothing but JAX and NumPy.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clip_jax.export.runtime import Exported

__all__ = ["load"]


def load(directory: str | os.PathLike[str]) -> "Exported":
    """Opens what `python -m clip_jax export --format=stablehlo` wrote, on the default device.

    Raises:
      UserError: a file is missing or damaged.
    """
    from clip_jax.export.runtime import Exported  # late, so that the commands' --help is instant

    return Exported(directory)
