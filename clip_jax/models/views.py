"""Random views of images on the device: what happens to a picture that is passed on.

To train a detector of near-duplicates (paper, appendix C): cut out and zoomed, stretched, turned a
little, made smaller and large again by other filters, recoloured and compressed as JPEG does.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from ml_collections import ConfigDict


class View(NamedTuple):
    """What is done to an image, in this order; scalars.

    Attributes:
      x, y: centre of the window that is cut out, in sides of the image from the top left corner.
      width, height: of the window, in sides of the image.
      angle: by which it is turned, clockwise in radians.
      side: pixels that it is made smaller to, and enlarged again.
      down, up: the filter of each, a place in `FILTERS`.
      hue: added to the hue, as a share of the circle.
      saturation, value: their factors, in HSV.
      quality: of the JPEG, from 1 to 100.
    """

    x: jax.Array
    y: jax.Array
    width: jax.Array
    height: jax.Array
    angle: jax.Array
    side: jax.Array
    down: jax.Array
    up: jax.Array
    hue: jax.Array
    saturation: jax.Array
    value: jax.Array
    quality: jax.Array


def two_views(
    images: jax.Array, key: jax.Array, config: ConfigDict, rows: jax.Array | None = None
) -> jax.Array:
    """Changes each image in two ways, by its own share of `key`.

    Args:
      images: uint8 [b, h, h, 3].
      key: of the step.
      config: the fields of `data.views` in configs/default.py.
      rows: int32 [b], numbers of the images, which decide with the key; None: 0, 1, 2, ...

    Returns:
      uint8 [b, 2, h, h, 3].
    """
    rows = jnp.arange(len(images)) if rows is None else rows

    def views(image: jax.Array, row: jax.Array) -> jax.Array:
        keys = jax.random.split(jax.random.fold_in(key, row))
        drawn = jax.vmap(lambda key: draw(key, config, len(image)))(keys)
        return jax.vmap(lambda view: change(image, view))(drawn)

    return jax.vmap(views)(images, rows)


def draw(key: jax.Array, config: ConfigDict, side: int) -> View:
    """A view of an image with sides of so many pixels."""
    drawn = iter(jax.random.uniform(key, (len(View._fields),)))  # in one: it compiles sooner

    def uniform(least: float | jax.Array, most: float | jax.Array) -> jax.Array:
        return least + (most - least) * next(drawn)

    area, ratio = uniform(*config.scale), jnp.exp(uniform(*map(math.log, config.ratio)))
    width, height = (jnp.minimum(jnp.sqrt(area * r), 1) for r in (ratio, 1 / ratio))
    turned = math.radians(config.angle)
    return View(
        x=uniform(width / 2, 1 - width / 2),
        y=uniform(height / 2, 1 - height / 2),
        width=width,
        height=height,
        angle=uniform(-turned, turned),
        side=jnp.round(side * uniform(config.shrink, 1.0)),
        down=uniform(0, len(FILTERS)).astype(jnp.int32),  # rounded down, so below the number
        up=uniform(0, len(FILTERS)).astype(jnp.int32),
        hue=uniform(-config.hue, config.hue),
        saturation=1 + uniform(-config.saturation, config.saturation),
        value=1 + uniform(-config.value, config.value),
        quality=uniform(*config.quality),
    )


def change(image: jax.Array, view: View) -> jax.Array:
    """A view of an image, uint8 [h, h, 3] to the same."""
    pixels = cut_out(image.astype(jnp.float32), view)
    pixels = shrink(pixels, view.side, view.down, view.up)
    pixels = recolour(pixels, view.hue, view.saturation, view.value)
    return compress(pixels, view.quality).astype(jnp.uint8)


# ---- Geometry. Pixels are float32 [h, h, 3] from 0 to 255, here and below. ---------------------


def cut_out(pixels: jax.Array, view: View) -> jax.Array:
    """The turned window, enlarged to the image; bilinear, the edge repeated outside."""
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


def _cubic(x: jax.Array, a: float = -0.5) -> jax.Array:
    """Keys' cubic convolution."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))


def shrink(pixels: jax.Array, side: jax.Array, down: jax.Array, up: jax.Array) -> jax.Array:
    """Resized to a square of `side` pixels, whole numbers there, and back; antialiased."""
    whole = len(pixels)
    small = jnp.round(_resize(pixels, _resampling(whole, side, whole, down)))
    return _resize(small, _resampling(side, whole, whole, up))


def _resize(pixels: jax.Array, weights: jax.Array) -> jax.Array:
    """With the weights of each new pixel along both sides."""
    product = jnp.einsum("yi,xj,ijc->yxc", weights, weights, pixels, precision="highest")
    return jnp.clip(product, 0, 255)


def _resampling(
    old: int | jax.Array, new: int | jax.Array, room: int, filter_: jax.Array
) -> jax.Array:
    """The weight of each of `old` pixels in each of `new` ones: [room, room], the rest zero."""
    scale = jnp.asarray(old / new, jnp.float32)
    places = jnp.arange(room, dtype=jnp.float32) + 0.5
    distance = (places[None] - scale * places[:, None]) / jnp.maximum(scale, 1)
    weights = jax.lax.switch(filter_, FILTERS, distance)
    weights = jnp.where((places < old)[None] & (places < new)[:, None], weights, 0)
    return weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1e-6)


# ---- Colour ------------------------------------------------------------------------------------


def recolour(
    pixels: jax.Array, hue: jax.Array, saturation: jax.Array, value: jax.Array
) -> jax.Array:
    """Hue, saturation and value changed, as in `View`."""
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

    def channel(offset: int) -> jax.Array:
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


def compress(pixels: jax.Array, quality: jax.Array) -> jax.Array:
    """What a JPEG file of this quality keeps, colours at full resolution; whole numbers."""
    side = len(pixels)
    padding = (0, -side % 8)
    blocks = jnp.pad(jnp.round(pixels), (padding, padding, (0, 0)), "edge")
    count = len(blocks) // 8
    blocks = blocks.reshape(count, 8, count, 8, 3)
    exact = {"precision": "highest"}
    colours = jnp.einsum("dc,aybxc->aybxd", _TO_YCC, blocks, **exact)
    colours = jnp.round(colours - jnp.array([128, 0, 0]))
    steps = _quantisation(quality)[:, None]
    waves = jnp.einsum("ky,lx,aybxd->akbld", _WAVES, _WAVES, colours, **exact)
    waves = jnp.round(waves / steps) * steps
    colours = jnp.einsum("ky,lx,akbld->aybxd", _WAVES, _WAVES, waves, **exact)
    colours = jnp.round(colours) + jnp.array([128, 0, 0])
    blocks = jnp.einsum("cd,aybxd->aybxc", _TO_RGB, colours, **exact)
    whole = blocks.reshape(8 * count, 8 * count, 3)[:side, :side]
    return jnp.clip(jnp.round(whole), 0, 255)


def _quantisation(quality: jax.Array) -> jax.Array:
    """Steps of brightness and both colours, float32 [8, 8, 3], as the IJG's library scales them."""
    share = jnp.where(quality < 50, 5000 / quality, 200 - 2 * quality)
    steps = jnp.clip(jnp.floor((_TABLES * share + 50) / 100), 1, 255)
    return jnp.stack([steps[0], steps[1], steps[1]], axis=2)
