"""The models of the paper as pure Flax modules.

Loaded on first use, so that configs can read `models.sizes` without loading JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_jax.models.clip import CLIP
    from clip_jax.models.image_model import ImageModel
    from clip_jax.models.modules import MODULES, create, of_size
    from clip_jax.models.sizes import Size, available_models, get_size

_HOMES = {
    "CLIP": "clip",
    "ImageModel": "image_model",
    "MODULES": "modules",
    "Size": "sizes",
    "available_models": "sizes",
    "create": "modules",
    "get_size": "sizes",
    "of_size": "modules",
}

__all__ = [
    "CLIP",
    "MODULES",
    "ImageModel",
    "Size",
    "available_models",
    "create",
    "get_size",
    "of_size",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'clip_jax.models' has no attribute {name!r}")
    return getattr(importlib.import_module(f"clip_jax.models.{_HOMES[name]}"), name)
