"""Random views of images on the device, like those of a picture that is copied around.

They train the detector of near-duplicates (paper, appendix C): cropped and zoomed, stretched,
rotated a little, downsampled and enlarged again, recoloured and compressed like a JPEG.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, Float32, Int, Key, UInt8
from ml_collections import ConfigDict

Pixels = Float32[Array, "side side 3"]
Scalar = Float[Array, ""]


class View(NamedTuple):
    """The changes of an image, in this order; scalars.

    Attributes:
      x, y: centre of the crop, in sides of the image from the top left corner.
      width, height: size of the crop, in sides of the image.
      angle: clockwise rotation of the crop in radians.
      side: side in pixels that it is downsampled to, before it is enlarged again.
      down, up: filter of each, a place in `FILTERS`.
      hue: shift of the hue, as a fraction of the circle.
      saturation, value: factors of these, in HSV.
      quality: quality of the JPEG, from 1 to 100.
    """

    x: Float[Array, "*batch"]
    y: Float[Array, "*batch"]
    width: Float[Array, "*batch"]
    height: Float[Array, "*batch"]
    angle: Float[Array, "*batch"]
    side: Float[Array, "*batch"]
    down: Int[Array, "*batch"]
    up: Int[Array, "*batch"]
    hue: Float[Array, "*batch"]
    saturation: Float[Array, "*batch"]
    value: Float[Array, "*batch"]
    quality: Float[Array, "*batch"]


def two_views(
    images: UInt8[Array, "batch side side 3"],
    key: Key[Array, ""],
    config: ConfigDict,
    rows: Int[Array, " batch"] | None = None,
) -> UInt8[Array, "batch 2 side side 3"]:
    """Makes two views of each image, by a key folded from `key` and its number.

    Args:
      images: square images.
      key: PRNG key of the step.
      config: the fields of `data.views` in configs/default.py.
      rows: numbers of the images; None: 0, 1, 2, ...
    """
    rows = jnp.arange(len(images)) if rows is None else rows

    def views(image, row):
        keys = jax.random.split(jax.random.fold_in(key, row))
        drawn = jax.vmap(lambda key: draw(key, config, len(image)))(keys)
        return jax.vmap(lambda view: change(image, view))(drawn)

    return jax.vmap(views)(images, rows)


def draw(key: Key[Array, ""], config: ConfigDict, side: int) -> View:
    """Draws a view of an image with this side in pixels."""
    drawn = iter(jax.random.uniform(key, (len(View._fields),)))  # in one call: it compiles faster

    def uniform(least, most):
        return least + (most - least) * next(drawn)

    area, ratio = uniform(*config.scale), jnp.exp(uniform(*map(math.log, config.ratio)))
    width, height = (jnp.minimum(jnp.sqrt(area * r), 1) for r in (ratio, 1 / ratio))
    most = math.radians(config.angle)
    return View(
        x=uniform(width / 2, 1 - width / 2),
        y=uniform(height / 2, 1 - height / 2),
        width=width,
        height=height,
        angle=uniform(-most, most),
        side=jnp.round(side * uniform(config.shrink, 1.0)),
        down=uniform(0, len(FILTERS)).astype(jnp.int32),  # rounded down, so below their number
        up=uniform(0, len(FILTERS)).astype(jnp.int32),
        hue=uniform(-config.hue, config.hue),
        saturation=1 + uniform(-config.saturation, config.saturation),
        value=1 + uniform(-config.value, config.value),
        quality=uniform(*config.quality),
    )


def change(image: UInt8[Array, "side side 3"], view: View) -> UInt8[Array, "side side 3"]:
    """Applies a view to an image."""
    pixels = cut_out(image.astype(jnp.float32), view)
    pixels = shrink(pixels, view.side, view.down, view.up)
    pixels = recolour(pixels, view.hue, view.saturation, view.value)
    return compress(pixels, view.quality).astype(jnp.uint8)


# ---- Geometry. Pixels are float32 [h, h, 3] from 0 to 255, here and below. ---------------------


def cut_out(pixels: Pixels, view: View) -> Pixels:
    """Enlarges the rotated crop to the image; bilinear, the edge repeated outside."""
    side = len(pixels)
    along = (jnp.arange(side) + 0.5) / side - 0.5
    right, below = view.width * along[None], view.height * along[:, None]
    cos, sin = jnp.cos(view.angle), jnp.sin(view.angle)
    x = side * (view.x + cos * right - sin * below) - 0.5
    y = side * (view.y + sin * right + cos * below) - 0.5
    return jax.vmap(lambda c: map_coordinates(c, (y, x), 1, "nearest"), 2, 2)(pixels)


# Filters of resampling, by the distance from the new pixel's centre in (widened) old pixels.
FILTERS: tuple[Callable[[jax.Array], jax.Array], ...] = (
    lambda x: ((x > -0.5) & (x <= 0.5)).astype(jnp.float32),  # box
    lambda x: jnp.maximum(1 - jnp.abs(x), 0),  # triangle: bilinear
    lambda x: _cubic(jnp.abs(x)),  # bicubic
)


def _cubic(x: Float[Array, "..."], a: float = -0.5) -> Float[Array, "..."]:
    """Computes Keys' cubic convolution kernel."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))


def shrink(pixels: Pixels, side: Scalar, down: Int[Array, ""], up: Int[Array, ""]) -> Pixels:
    """Resizes to a square of `side` pixels, rounded there, and back; antialiased."""
    whole = len(pixels)
    small = jnp.round(_resize(pixels, _resampling(whole, side, whole, down)))
    return _resize(small, _resampling(side, whole, whole, up))


def _resize(pixels: Pixels, weights: Float32[Array, "side side"]) -> Pixels:
    """Resamples with the weights of each new pixel, along both sides."""
    product = jnp.einsum("yi,xj,ijc->yxc", weights, weights, pixels, precision="highest")
    return jnp.clip(product, 0, 255)


def _resampling(
    old: int | Scalar, new: int | Scalar, room: int, filter_: Int[Array, ""]
) -> Float32[Array, "{room} {room}"]:
    """Computes the weight of each of `old` pixels in each of `new` ones, the rest zero."""
    scale = jnp.asarray(old / new, jnp.float32)
    places = jnp.arange(room, dtype=jnp.float32) + 0.5
    distance = (places[None] - scale * places[:, None]) / jnp.maximum(scale, 1)
    weights = jax.lax.switch(filter_, FILTERS, distance)
    weights = jnp.where((places < old)[None] & (places < new)[:, None], weights, 0)
    return weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1e-6)


# ---- Colour ------------------------------------------------------------------------------------


def recolour(pixels: Pixels, hue: Scalar, saturation: Scalar, value: Scalar) -> Pixels:
    """Changes hue, saturation and value; see `View`."""
    high, low = pixels.max(axis=2), pixels.min(axis=2)
    chroma = jnp.maximum(high - low, 1e-6)
    red, green, blue = (pixels[..., i] for i in range(3))
    sector = jnp.where(
        high == red,
        (green - blue) / chroma,
        jnp.where(high == green, 2 + (blue - red) / chroma, 4 + (red - green) / chroma),
    )
    depth = jnp.clip(saturation * (high - low) / jnp.maximum(high, 1e-6), 0, 1)
    high = jnp.clip(value * high, 0, 255)

    def channel(offset):
        place = (offset + sector + 6 * hue) % 6
        return high * (1 - depth * jnp.clip(jnp.minimum(place, 4 - place), 0, 1))

    return jnp.stack([channel(5), channel(3), channel(1)], axis=2)


# ---- Compression -------------------------------------------------------------------------------

# Quantisation of brightness and of colour at quality 50 (ITU-T T.81, annex K.1).
_TABLES = np.array(
    [
        [
            [16, 11, 10, 16, 24, 40, 51, 61],
            [12, 12, 14, 19, 26, 58, 60, 55],
            [14, 13, 16, 24, 40, 57, 69, 56],
            [14, 17, 22, 29, 51, 87, 80, 62],
            [18, 22, 37, 56, 68, 109, 103, 77],
            [24, 35, 55, 64, 81, 104, 113, 92],
            [49, 64, 78, 87, 103, 121, 120, 101],
            [72, 92, 95, 98, 112, 100, 103, 99],
        ],
        [
            [17, 18, 24, 47, 99, 99, 99, 99],
            [18, 21, 26, 66, 99, 99, 99, 99],
            [24, 26, 56, 99, 99, 99, 99, 99],
            [47, 66, 99, 99, 99, 99, 99, 99],
            *[[99] * 8] * 4,
        ],
    ]
)
# RGB to brightness and two differences (JFIF), and back.
_TO_YCC = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
)
_TO_RGB = np.linalg.inv(_TO_YCC)
_WAVES = np.array(
    [
        [math.cos((2 * n + 1) * k * math.pi / 16) / (2 if k else math.sqrt(8)) for n in range(8)]
        for k in range(8)
    ]
)


def compress(pixels: Pixels, quality: Scalar) -> Pixels:
    """Compresses and decompresses like a JPEG, colours at full resolution; whole numbers."""
    side = len(pixels)
    padding = (0, -side % 8)
    blocks = jnp.pad(jnp.round(pixels), (padding, padding, (0, 0)), "edge")
    count = len(blocks) // 8
    blocks = blocks.reshape(count, 8, count, 8, 3)
    colours = jnp.einsum("dc,aybxc->aybxd", _TO_YCC, blocks, precision="highest")
    colours = jnp.round(colours - jnp.array([128, 0, 0]))
    steps = _quantisation(quality)[:, None]
    waves = jnp.einsum("ky,lx,aybxd->akbld", _WAVES, _WAVES, colours, precision="highest")
    waves = jnp.round(waves / steps) * steps
    colours = jnp.einsum("ky,lx,akbld->aybxd", _WAVES, _WAVES, waves, precision="highest")
    colours = jnp.round(colours) + jnp.array([128, 0, 0])
    blocks = jnp.einsum("cd,aybxd->aybxc", _TO_RGB, colours, precision="highest")
    whole = blocks.reshape(8 * count, 8 * count, 3)[:side, :side]
    return jnp.clip(jnp.round(whole), 0, 255)


def _quantisation(quality: Scalar) -> Float32[Array, "8 8 3"]:
    """Scales the steps of brightness and both colours as the IJG's library does."""
    percent = jnp.where(quality < 50, 5000 / quality, 200 - 2 * quality)
    steps = jnp.clip(jnp.floor((_TABLES * percent + 50) / 100), 1, 255)
    return jnp.stack([steps[0], steps[1], steps[1]], axis=2)
