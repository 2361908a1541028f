"""Augmentation on the device: mirroring, jitter of colours, grey; off unless the config asks."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

# Share of red, green and blue in brightness (ITU-R BT.601), as Pillow and torchvision weigh them.
_GREY = (0.299, 0.587, 0.114)


def augment(images: jax.Array, key: jax.Array, config: ConfigDict) -> jax.Array:
    """Changes each image by chance, by its own share of `key`: the row in the global batch.

    So the result does not depend on how the batch is split over devices. Brightness, contrast and
    saturation change in this order, each by a factor of its own, as in torchvision's ColorJitter;
    grey is a saturation of none. With every probability 0, the images are returned as they are.

    Args:
      images: [b, h, w, 3], the global batch; uint8, or floating from 0 to 255.
      key: of the step.
      config: `flip`, `jitter`, `grey`: the probability of each; `brightness`, `contrast`,
        `saturation`: the greatest change by jitter, as a share: 0.4 is a factor of 0.6 to 1.4.

    Returns:
      The same shape and dtype.
    """
    if not (config.flip or config.jitter or config.grey):
        return images
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(images)))
    flipped, factors = jax.vmap(lambda key: _draw(key, config))(keys)
    pixels = images
    if config.flip:
        pixels = jnp.where(flipped[:, None, None, None], pixels[:, :, ::-1], pixels)
    if config.jitter or config.grey:
        pixels = _recolour(pixels.astype(jnp.float32), factors)
        if images.dtype == jnp.uint8:
            pixels = jnp.round(pixels)
    return pixels.astype(images.dtype)


def _draw(key: jax.Array, config: ConfigDict) -> tuple[jax.Array, jax.Array]:
    """Whether an image is mirrored, and float32 [3]: its factors."""
    flip, jitter, change, grey = jax.random.split(key, 4)
    strength = jnp.array([config.brightness, config.contrast, config.saturation])
    strength *= jax.random.bernoulli(jitter, config.jitter)
    factors = 1 + strength * jax.random.uniform(change, (3,), minval=-1.0)
    colour = ~jax.random.bernoulli(grey, config.grey)
    return jax.random.bernoulli(flip, config.flip), factors * jnp.array([1, 1, colour])


def _recolour(pixels: jax.Array, factors: jax.Array) -> jax.Array:
    """Pixels float32 [b, h, w, 3], factors [b, 3] of brightness, contrast and saturation."""
    brightness, contrast, saturation = (factors[:, i, None, None, None] for i in range(3))
    pixels = jnp.clip(pixels * brightness, 0, 255)
    mean = _grey(pixels).mean((1, 2), keepdims=True)
    pixels = jnp.clip(_blend(mean, pixels, contrast), 0, 255)
    return jnp.clip(_blend(_grey(pixels), pixels, saturation), 0, 255)


def _grey(pixels: jax.Array) -> jax.Array:
    """[b, h, w, 1]; spelt out, since a matmul would run in bfloat16 on a TPU."""
    red, green, blue = (pixels[..., i, None] * share for i, share in enumerate(_GREY))
    return red + green + blue


def _blend(base: jax.Array, pixels: jax.Array, factor: jax.Array) -> jax.Array:
    """Exactly `pixels` at factor 1."""
    return factor * pixels + (1 - factor) * base
