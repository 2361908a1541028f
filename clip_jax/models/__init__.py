"""The models of the paper as pure Flax modules."""

from clip_jax.models.clip import CLIP, create
from clip_jax.models.sizes import Size, available_models, get_size

__all__ = ["CLIP", "Size", "available_models", "create", "get_size"]
