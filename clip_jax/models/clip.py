"""CLIP: an image tower and a text tower that meet in one embedding space."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from clip_jax import sharding
from clip_jax.errors import UserError
from clip_jax.models.packing import Pack
from clip_jax.models.resnet import ModifiedResNet
from clip_jax.models.sizes import Size, get_size
from clip_jax.models.text import TextTransformer
from clip_jax.models.transformer import Dtype
from clip_jax.models.vit import VisionTransformer


class CLIP(nn.Module):
    """Both towers and the temperature; pure `init` and `apply`.

    Variables are {"params": ...} in float32 and, for a ResNet, {"batch_stats": ...}.

    Attributes:
      patch_dropout: share of the patches that a ViT does not see in training.
      pack: how several captions share a row of the text tower in training; None: they do not.
    """

    size: Size
    dtype: Dtype = jnp.float32
    scan_layers: bool = True
    remat: str = "none"
    patch_dropout: float = 0.0
    pack: Pack | None = None

    def setup(self):
        layers = {"scan_layers": self.scan_layers, "remat": self.remat}
        if self.size.is_resnet:
            self.image = ModifiedResNet(self.size, self.dtype)
        else:
            self.image = VisionTransformer(
                self.size, self.dtype, patch_dropout=self.patch_dropout, **layers
            )
        self.text = TextTransformer(self.size, self.dtype, pack=self.pack, **layers)
        constant, biased = nn.initializers.constant, self.size.logit_bias
        scale = math.log(10 if biased else 1 / 0.07)
        self.logit_scale = self.param("logit_scale", constant(scale), (), jnp.float32)
        if biased:  # almost all pairs are negatives: at -10 they start with a small loss
            self.logit_bias = self.param("logit_bias", constant(-10), (), jnp.float32)

    def __call__(
        self,
        images: jax.Array,
        tokens: jax.Array,
        train: bool = False,
        rows: jax.Array | None = None,
    ) -> tuple[jax.Array, ...]:
        """Embeds pairs.

        Args:
          images: uint8 [b, h, w, 3], or floats normalised as `normalize_images` does.
          tokens: int32 [b, s], s at most the context length.
          train: BatchNorm uses the statistics of this batch and updates the running ones (make
            "batch_stats" mutable); a ViT drops patches.
          rows: int32 [b], the number of each example in the whole batch, where anything is random:
            what is drawn for an example depends on it and the "dropout" key alone.

        Returns:
          image and text embeddings, float32 [b, embed_dim], L2-normalised; logit_scale, the
          natural logarithm of the multiplier of the similarities, float32 []; and, where the size
          has one, logit_bias, what is added to them after that, float32 [].
        """
        embeds = self.encode_image(images, train, rows), self.encode_text(tokens, train)
        bias = (self.logit_bias,) if self.size.logit_bias else ()
        return *embeds, self.logit_scale, *bias

    def encode_image(
        self, images: jax.Array, train: bool = False, rows: jax.Array | None = None
    ) -> jax.Array:
        """Images as in `__call__` -> float32 [b, embed_dim], L2-normalised."""
        images = normalize_images(images, self.size).astype(self.dtype)
        if isinstance(self.image, ModifiedResNet):  # draws nothing
            return l2_normalize(sharding.constrain_batch(self.image(images, train)))
        return l2_normalize(sharding.constrain_batch(self.image(images, train, rows)))

    def image_features(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The same embeddings, and what linear probes read (paper section 3.2), float32 [b, f].

        Of a ViT: the pooled token before the projection. Of a ResNet: the attention pool's output,
        not yet normalised, since the last matrix is part of the pool. To be applied with
        mutable=["intermediates"].
        """
        embeds = self.encode_image(images)
        (features,) = self.image.get_variable("intermediates", "features")
        return embeds, sharding.constrain_batch(features).astype(jnp.float32)

    def encode_text(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        """int32 [b, s] -> float32 [b, embed_dim], L2-normalised."""
        return l2_normalize(sharding.constrain_batch(self.text(tokens, train)))


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


def create(
    name: str,
    *,
    dtype: Dtype = jnp.float32,
    scan_layers: bool = True,
    remat: str = "none",
    patch_dropout: float = 0.0,
    pack: Mapping[str, Any] | None = None,
    size: Mapping[str, Any] | None = None,
) -> CLIP:
    """A model by name.

    Args:
      name: one of `available_models()`.
      dtype: of the compute; parameters are float32.
      scan_layers: run transformer layers in a `lax.scan`, or unroll them.
      remat: what the backward pass recomputes; see `transformer.remat_layer`.
      patch_dropout: share of the patches that a ViT does not see in training.
      pack: {"length": tokens in a row, "rows": rows per caption} of `packing.Pack`; None or length
        0: each caption has a row of its own.
      size: overrides of the named shapes; see `Size`.

    Raises:
      UserError: unknown name, or settings that do not go together.
    """
    shapes = get_size(name, size)
    if not 0 <= patch_dropout < 1 or (patch_dropout and shapes.is_resnet):
        raise UserError(
            f"model.patch_dropout is {patch_dropout}: it takes a share of the patches, 0 or more "
            "and less than 1, of a ViT; a ResNet has none."
        )
    return CLIP(
        shapes,
        dtype=dtype,
        scan_layers=scan_layers,
        remat=remat,
        patch_dropout=patch_dropout,
        pack=_make_pack(pack, shapes),
    )


def _make_pack(pack: Mapping[str, Any] | None, size: Size) -> Pack | None:
    """Raises UserError unless such captions can be packed so."""
    if pack is None or pack["length"] == 0:
        return None
    if not size.text_causal or size.text_pool != "end":
        raise UserError(
            "model.pack needs a causal text tower that reads the end token, so that what follows "
            f"it changes nothing; that of {size} is not: leave --config.model.pack.length=0."
        )
    if pack["length"] < size.context_length:
        raise UserError(
            f"model.pack.length is {pack['length']}, and a caption may have {size.context_length} "
            f"tokens: take at least --config.model.pack.length={size.context_length}, or 0."
        )
    if not 0 < pack["rows"] <= 1:
        raise UserError(f"model.pack.rows is {pack['rows']}: it takes a number above 0, up to 1.")
    return Pack(int(pack["length"]), float(pack["rows"]))
