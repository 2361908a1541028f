"""The models of the paper as pure Flax modules."""

from clip_jax.models.clip import CLIP
from clip_jax.models.image_model import ImageModel
from clip_jax.models.modules import MODULES, create, of_size
from clip_jax.models.sizes import Size, available_models, get_size

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
