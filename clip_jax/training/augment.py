"""Augmentation on the device: mirroring, jitter of colours, grey; off unless the config asks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Key, Shaped
from ml_collections import ConfigDict

# Weights of red, green and blue in brightness (ITU-R BT.601), those of Pillow and torchvision.
_GREY = (0.299, 0.587, 0.114)


def augment(
    images: Shaped[Array, "batch height width 3"], key: Key[Array, ""], config: ConfigDict
) -> Shaped[Array, "batch height width 3"]:
    """Changes images at random, each by a key folded from `key` and its row in the global batch.

    So the result does not depend on how the batch is split over devices. Brightness, contrast and
    saturation change in this order, each by a factor of its own, as in torchvision's ColorJitter;
    grey is a saturation of 0. With every probability 0, the images are returned as they are.

    Args:
      images: the global batch; uint8, or floats from 0 to 255, a dtype that it keeps.
      key: PRNG key of the step.
      config: `flip`, `jitter`, `grey`: probability of each; `brightness`, `contrast`, `saturation`:
        greatest change by jitter, as a fraction: 0.4 is a factor of 0.6 to 1.4.
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


def _draw(key: Key[Array, ""], config: ConfigDict) -> tuple[Bool[Array, ""], Float32[Array, "3"]]:
    """Draws whether an image is mirrored, and the factors of its colours."""
    flip, jitter, change, grey = jax.random.split(key, 4)
    strength = jnp.array([config.brightness, config.contrast, config.saturation])
    strength *= jax.random.bernoulli(jitter, config.jitter)
    factors = 1 + strength * jax.random.uniform(change, (3,), minval=-1.0)
    colour = ~jax.random.bernoulli(grey, config.grey)
    return jax.random.bernoulli(flip, config.flip), factors * jnp.array([1, 1, colour])


def _recolour(
    pixels: Float32[Array, "batch height width 3"], factors: Float32[Array, "batch 3"]
) -> Float32[Array, "batch height width 3"]:
    """Changes brightness, contrast and saturation by these factors."""
    brightness, contrast, saturation = (factors[:, i, None, None, None] for i in range(3))
    pixels = jnp.clip(pixels * brightness, 0, 255)
    mean = _grey(pixels).mean((1, 2), keepdims=True)
    pixels = jnp.clip(_blend(mean, pixels, contrast), 0, 255)
    return jnp.clip(_blend(_grey(pixels), pixels, saturation), 0, 255)


def _grey(
    pixels: Float32[Array, "batch height width 3"],
) -> Float32[Array, "batch height width 1"]:
    """Computes the brightness; spelt out, since a matmul would run in bfloat16 on a TPU."""
    red, green, blue = (pixels[..., i, None] * weight for i, weight in enumerate(_GREY))
    return red + green + blue


def _blend(
    base: Float32[Array, " batch #height #width #channels"],
    pixels: Float32[Array, "batch height width channels"],
    factor: Float32[Array, "batch 1 1 1"],
) -> Float32[Array, "batch height width channels"]:
    """Interpolates from `base` to `pixels`; exactly `pixels` at factor 1."""
    return factor * pixels + (1 - factor) * base
