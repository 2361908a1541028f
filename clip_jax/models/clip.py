"""CLIP: an image tower and a text tower that meet in one embedding space."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from clip_jax.models.resnet import ModifiedResNet
from clip_jax.models.sizes import Size, get_size
from clip_jax.models.text import TextTransformer
from clip_jax.models.transformer import Dtype
from clip_jax.models.vit import VisionTransformer

# Of the published models, per RGB channel of pixels in [0, 1].
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


class CLIP(nn.Module):
    """Both towers and the temperature; pure `init` and `apply`.

    Variables are {"params": ...} in float32 and, for a ResNet, {"batch_stats": ...}.
    """

    size: Size
    dtype: Dtype = jnp.float32
    scan_layers: bool = True
    remat: str = "none"

    def setup(self):
        layers = {"scan_layers": self.scan_layers, "remat": self.remat}
        if self.size.is_resnet:
            self.image = ModifiedResNet(self.size, self.dtype)
        else:
            self.image = VisionTransformer(self.size, self.dtype, **layers)
        self.text = TextTransformer(self.size, self.dtype, **layers)
        initial_scale = nn.initializers.constant(math.log(1 / 0.07))
        self.logit_scale = self.param("logit_scale", initial_scale, (), jnp.float32)

    def __call__(
        self, images: jax.Array, tokens: jax.Array, train: bool = False
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Embeds pairs.

        Args:
          images: uint8 [b, h, w, 3], or floats normalised as `normalize_images` does.
          tokens: int32 [b, s], s at most the context length.
          train: BatchNorm uses the statistics of this batch and updates the running ones (make
            "batch_stats" mutable); no effect on a ViT.

        Returns:
          image and text embeddings, float32 [b, embed_dim], L2-normalised; and logit_scale, the
          natural logarithm of the multiplier of the similarities, float32 [].
        """
        return self.encode_image(images, train), self.encode_text(tokens), self.logit_scale

    def encode_image(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Images as in `__call__` -> float32 [b, embed_dim], L2-normalised."""
        return l2_normalize(self.image(normalize_images(images).astype(self.dtype), train))

    def encode_text(self, tokens: jax.Array) -> jax.Array:
        """int32 [b, s] -> float32 [b, embed_dim], L2-normalised."""
        return l2_normalize(self.text(tokens))


def normalize_images(images: jax.Array) -> jax.Array:
    """uint8 pixels to float32 with the published mean and deviation; floats pass unchanged."""
    if images.dtype != jnp.uint8:
        return images
    return (images.astype(jnp.float32) / 255 - jnp.array(IMAGE_MEAN)) / jnp.array(IMAGE_STD)


def l2_normalize(x: jax.Array) -> jax.Array:
    """[..., d] of any float dtype -> float32 unit vectors; the zero vector stays finite."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def create(
    name: str,
    *,
    dtype: Dtype = jnp.float32,
    scan_layers: bool = True,
    remat: str = "none",
    size: Mapping[str, Any] | None = None,
) -> CLIP:
    """A model of the paper by name; entries of `size` override its shapes (see `Size`).

    Raises:
      UserError: unknown name, or shapes that do not go together.
    """
    return CLIP(get_size(name, size), dtype=dtype, scan_layers=scan_layers, remat=remat)
