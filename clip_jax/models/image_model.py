"""What all models share: an image tower, and what pixels and features go through around it."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from clip_jax import sharding
from clip_jax.models.resnet import ModifiedResNet
from clip_jax.models.sizes import Size
from clip_jax.models.transformer import Dtype
from clip_jax.models.vit import VisionTransformer


class ImageModel(nn.Module):
    """An image tower called "image"; what stands beside it is added by those derived from this.

    Attributes:
      patch_dropout: share of the patches that a ViT does not see in training.
    """

    size: Size
    dtype: Dtype = jnp.float32
    scan_layers: bool = True
    remat: str = "none"
    patch_dropout: float = 0.0

    def setup(self):
        if self.size.is_resnet:
            self.image = ModifiedResNet(self.size, self.dtype, self.remat)
        else:
            self.image = VisionTransformer(
                self.size, self.dtype, self.scan_layers, self.remat, self.patch_dropout
            )

    def image_features(
        self, images: jax.Array, train: bool = False, rows: jax.Array | None = None
    ) -> jax.Array:
        """What the image tower says of images.

        Args:
          images: uint8 [b, h, w, 3], or floats normalised as `normalize_images` does.
          train: BatchNorm uses the statistics of this batch and updates the running ones (make
            "batch_stats" mutable); a ViT drops patches.
          rows: int32 [b], the number of each example in the whole batch, where anything is random:
            what is drawn for an example depends on it and the "dropout" key alone.

        Returns:
          [b, embed_dim] in the compute dtype, not normalised.
        """
        images = normalize_images(images, self.size).astype(self.dtype)
        if isinstance(self.image, ModifiedResNet):  # draws nothing
            return sharding.constrain_batch(self.image(images, train))
        return sharding.constrain_batch(self.image(images, train, rows))

    def encode_image(
        self, images: jax.Array, train: bool = False, rows: jax.Array | None = None
    ) -> jax.Array:
        """Images as in `image_features` -> float32 [b, embed_dim], L2-normalised."""
        return l2_normalize(self.image_features(images, train, rows))

    def encode_with_features(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The same embeddings, and what linear probes read (paper section 3.2), float32 [b, f].

        Of a ViT: the pooled token before the projection. Of a ResNet: the attention pool's output,
        not yet normalised, since the last matrix is part of the pool. To be applied with
        mutable=["intermediates"].
        """
        embeds = self.encode_image(images)
        (features,) = self.image.get_variable("intermediates", "features")
        return embeds, sharding.constrain_batch(features).astype(jnp.float32)


def normalize_images(images: jax.Array, size: Size) -> jax.Array:
    """uint8 pixels to float32 with the mean and deviation of `size`; floats pass unchanged."""
    if images.dtype != jnp.uint8:
        return images
    mean, std = (jnp.array(part, jnp.float32) for part in (size.image_mean, size.image_std))
    return (images.astype(jnp.float32) / 255 - mean) / std


def l2_normalize(x: jax.Array) -> jax.Array:
    """[..., d] of any float dtype -> float32 unit vectors; the zero vector stays finite."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
