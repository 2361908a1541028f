"""The base of all models: an image tower, pixels normalised before it and features after it."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Float32, Int, Shaped

from clip_jax import sharding
from clip_jax.models.layers import Dtype
from clip_jax.models.resnet import ModifiedResNet
from clip_jax.models.sizes import Size
from clip_jax.models.vit import VisionTransformer

# Arguments of the models' methods; NumPy arrays do as well. Pixels are uint8, or floats normalised
# as `normalize_images` does.
Images = Shaped[Array | np.ndarray, "batch height width 3"]
TokenIds = Int[Array | np.ndarray, "batch length"]
RowIds = Int[Array | np.ndarray, " batch"]
Embeds = Float32[Array, "batch embed"]
# Fields of a batch, by name: "image", "tokens" and, where anything is random, "row", the number of
# each example in the whole batch.
Inputs = Mapping[str, Shaped[Array | np.ndarray, "batch ..."]]
# By name: arrays with the batch first, and scalars, which are parameters.
Outputs = dict[str, Float32[Array, "..."]]


class ImageModel(nn.Module):
    """An image tower called "image"; each subclass adds the rest of its model and `outputs`.

    Attributes:
      patch_dropout: fraction of the patches that a ViT leaves out in training.
      text_remat: `remat` of the text tower; "": the same.
      attention: the form of attention that both transformers compute; see `attention.FORMS`.
    """

    size: Size
    dtype: Dtype = jnp.float32
    scan_layers: bool = True
    remat: str = "none"
    patch_dropout: float = 0.0
    text_remat: str = ""
    attention: str = "xla"

    def setup(self):
        if self.size.is_resnet:
            self.image = ModifiedResNet(self.size, self.dtype, self.remat)
        else:
            self.image = VisionTransformer(
                self.size,
                self.dtype,
                self.scan_layers,
                self.remat,
                self.attention,
                self.patch_dropout,
            )

    def __call__(
        self,
        images: Shaped[Array | np.ndarray, "batch *views height width 3"],
        tokens: Int[Array | np.ndarray, "batch *captions length"],
        train: bool = False,
        rows: RowIds | None = None,
    ) -> tuple[Float32[Array, "..."], ...]:
        """Computes the values of `outputs`, without their names."""
        return tuple(self.outputs(as_batch(images, tokens, rows), train).values())

    def outputs(self, batch: Inputs, train: bool = False) -> Outputs:
        """Computes what the loss of the objective takes, by name; see `objectives.OBJECTIVES`.

        Args:
          batch: fields of the batch.
          train: see `image_features`.
        """
        raise NotImplementedError

    def image_features(
        self, images: Images, train: bool = False, rows: RowIds | None = None
    ) -> Float[Array, "batch embed"]:
        """Computes the output of the image tower.

        Args:
          images: uint8, or floats normalised as `normalize_images` does.
          train: BatchNorm uses the statistics of this batch and updates the running ones (make
            "batch_stats" mutable); a ViT drops patches.
          rows: number of each example in the whole batch, needed where anything is random: what is
            drawn for an example depends on it and the "dropout" key alone.

        Returns:
          Embeddings in the compute dtype, not L2-normalised.
        """
        images = normalize_images(images, self.size).astype(self.dtype)
        if isinstance(self.image, ModifiedResNet):  # draws nothing
            return sharding.constrain_batch(self.image(images, train))
        return sharding.constrain_batch(self.image(images, train, rows))

    def image_features_and_tokens(
        self, images: Images, train: bool = False, rows: RowIds | None = None
    ) -> tuple[Float[Array, "batch embed"], Float[Array, "batch tokens channels"]]:
        """Computes the output of a ViT, and that of its last block for all tokens."""
        images = normalize_images(images, self.size).astype(self.dtype)
        assert isinstance(self.image, VisionTransformer)
        features, tokens = self.image(images, train, rows, also="tokens")
        return sharding.constrain_batch(features), sharding.constrain_batch(tokens)

    def pooled_features(
        self, images: Images, train: bool = False, rows: RowIds | None = None
    ) -> Float[Array, "batch features"]:
        """Computes the features before the projection; of a ResNet, those after it."""
        if not isinstance(self.image, VisionTransformer):
            return self.image_features(images, train, rows)
        images = normalize_images(images, self.size).astype(self.dtype)
        return sharding.constrain_batch(self.image(images, train, rows, also="pooled")[1])

    def encode_image(
        self, images: Images, train: bool = False, rows: RowIds | None = None
    ) -> Embeds:
        """Embeds images, L2-normalised; arguments as in `image_features`."""
        return l2_normalize(self.image_features(images, train, rows))

    def encode_with_features(
        self, images: Images
    ) -> tuple[Embeds, Float32[Array, "batch features"]]:
        """Returns embeddings and the pre-projection features for linear probes (section 3.2).

        The features of a ViT are its pooled token before the projection; those of a ResNet are the
        attention pool's output, not yet normalised, since the last matrix is part of the pool.
        Apply with mutable=["intermediates"].
        """
        embeds = self.encode_image(images)
        (features,) = self.image.get_variable("intermediates", "features")
        return embeds, sharding.constrain_batch(features).astype(jnp.float32)


def flat_views(
    images: Shaped[Array | np.ndarray, "batch *views height width 3"], rows: RowIds | None
) -> tuple[
    Shaped[Array | np.ndarray, "flat height width 3"], Int[Array | np.ndarray, " flat"] | None
]:
    """Returns the views of all images in a row, and their numbers: each draws for itself."""
    flat = images.reshape(-1, *images.shape[-3:])
    count = len(flat) // len(images)
    if rows is not None:
        rows = (count * rows[:, None] + jnp.arange(count)).reshape(-1)
    return flat, rows


def as_batch(
    images: Shaped[Array | np.ndarray, "batch *views height width 3"],
    tokens: Int[Array | np.ndarray, "batch *captions length"],
    rows: RowIds | None,
) -> Inputs:
    """Names the fields of a batch."""
    return {"image": images, "tokens": tokens, **({} if rows is None else {"row": rows})}


def normalize_images(
    images: Shaped[Array | np.ndarray, "*batch height width 3"], size: Size
) -> Float[Array, "*batch height width 3"]:
    """Normalises uint8 pixels by the mean and deviation of `size`; floats pass unchanged."""
    if images.dtype != jnp.uint8:
        return jnp.asarray(images)
    mean, std = (jnp.array(part, jnp.float32) for part in (size.image_mean, size.image_std))
    return (jnp.asarray(images, jnp.float32) / 255 - mean) / std


def end_places(tokens: TokenIds, end_token: int | None) -> RowIds:
    """Returns the place of each caption's first end token; None: of its largest id."""
    return (tokens if end_token is None else tokens == end_token).argmax(axis=1)


def l2_normalize(x: Float[Array, "*batch d"]) -> Float32[Array, "*batch d"]:
    """Scales vectors of any float dtype to length 1 in float32; the zero vector stays finite."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
