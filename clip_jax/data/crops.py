"""Crops: the part of an image that is kept, resized to a square; antialiased."""

import dataclasses
import math
import threading
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from clip_jax.choices import CROPS
from clip_jax.errors import UserError

try:
    import cykooz_resizer as simd
except ImportError:  # no wheel for ARM Linux; Pillow makes the same picture, slower
    simd = None

_local = threading.local()

# A draw of area and proportions that does not fit into the image is repeated so often.
_TRIES = 10

# Wider than this, an image is cut to it before it is resized by its shorter side: a 10,000 x 1
# line would become two million pixels wide.
_MAX_ASPECT = 16


@dataclasses.dataclass(frozen=True)
class Crop:
    """A way to make an image a square.

    Attributes:
      name: "random": a random square as wide as the image's shorter side (the paper's only
        augmentation, section 2.4); "resized": a random rectangle, squashed to a square, as
        torchvision's RandomResizedCrop draws it; "center": the middle square, exactly as OpenAI's
        preprocessing for evaluation makes it; "none": the whole image squashed to a square.
      scale: least and greatest fraction of the image's area, for "resized".
      ratio: least and greatest width / height, for "resized".
      filter: Pillow's filter for "center" and "none"; random crops are bicubic.

    Raises:
      UserError: an unknown name, or ranges that hold no rectangle.
    """

    name: str
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    filter: str = "bicubic"

    def __post_init__(self) -> None:
        if self.name not in CROPS:
            raise UserError(f"There is no crop {self.name!r}: choose one of {', '.join(CROPS)}.")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(
                f"A crop's scale is {self.scale}; it is the least and the greatest fraction of "
                "the image's area, both above 0 and at most 1, such as (0.9, 1.0)."
            )
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise UserError(
                f"A crop's ratio is {self.ratio}; it is the least and the greatest width / height, "
                "both above 0, such as (0.75, 1.33)."
            )

    @property
    def is_random(self) -> bool:
        """True if the crop is drawn at random, by `window`; other crops are made by `fixed`."""
        return self.name in ("random", "resized")


CENTER = Crop("center")


@dataclasses.dataclass(frozen=True)
class Window:
    """A rectangle of whole pixels within an image."""

    left: int
    top: int
    width: int
    height: int

    def shrink_factor(self, size: int) -> int:
        """Returns the factor, 1, 2, 4 or 8, by which a JPEG may be decoded smaller and stay sharp.

        The window keeps at least twice the `size` pixels along a side that it is resized to.
        """
        least = min(self.width, self.height) // (2 * size)
        return next((factor for factor in (8, 4, 2) if factor <= least), 1)

    def shrunk(self, factor: int) -> "Window":
        """Returns the window in the image decoded 1 / factor as large."""
        sides = (self.left, self.top, self.width, self.height)
        return Window(*(side // factor for side in sides))


def window(crop: Crop, width: int, height: int, rng: np.random.Generator) -> Window:
    """Draws the part that a random crop keeps of a width x height image."""
    if crop.name == "resized":
        return _random_rectangle(crop, width, height, rng)
    side = min(width, height)
    return _placed(side, side, width, height, rng)


def resize(
    image: UInt8[np.ndarray, "h w 3"], part: Window, size: int
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Resizes a part of an image to a square.

    Args:
      image: pixels.
      part: the part of the image.
      size: pixels along a side.

    Returns:
      The resized pixels. On photographs within 2 of Pillow's bicubic resize; on noise further away,
      since values that overshoot are clipped between the two passes.
    """
    cut = image[part.top : part.top + part.height, part.left : part.left + part.width]
    if cut.shape == (size, size, 3):
        return cut
    if simd is None:
        return _squash(Image.fromarray(cut), size, Image.Resampling.BICUBIC)
    resizer, options = _resizer()
    source = simd.ImageData(part.width, part.height, simd.PixelType.U8x3, cut.tobytes())
    target = simd.ImageData(size, size, simd.PixelType.U8x3)
    resizer.resize(source, target, options)
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(size, size, 3)


def _resizer() -> tuple[Any, Any]:
    """The resizer of this thread, and its options; to make one takes longer than to resize."""
    if not hasattr(_local, "resizer"):
        assert simd is not None
        bicubic = simd.ResizeAlg.convolution(simd.FilterType.catmull_rom)
        _local.resizer = simd.Resizer(), simd.ResizeOptions(resize_alg=bicubic)
    return _local.resizer


def fixed(image: Image.Image, size: int, crop: Crop) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Makes a crop that is not random, by Pillow itself."""
    resample = Image.Resampling[crop.filter.upper()]
    make = _squash if crop.name == "none" else _middle
    return make(image, size, resample)


def _random_rectangle(crop: Crop, width: int, height: int, rng: np.random.Generator) -> Window:
    lowest, highest = (math.log(ratio) for ratio in crop.ratio)
    for _ in range(_TRIES):
        area = _between(*crop.scale, rng) * width * height
        ratio = math.exp(_between(lowest, highest, rng))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return _placed(w, h, width, height, rng)
    # None fits: the largest middle part of permitted proportions.
    w = max(1, min(width, round(height * crop.ratio[1])))
    h = max(1, min(height, round(width / crop.ratio[0])))
    return Window((width - w) // 2, (height - h) // 2, w, h)


def _placed(w: int, h: int, width: int, height: int, rng: np.random.Generator) -> Window:
    left, top = (int(rng.random() * (room + 1)) for room in (width - w, height - h))
    return Window(left, top, w, h)


def _between(low: float, high: float, rng: np.random.Generator) -> float:
    # Not by rng.uniform: one of NumPy's calls takes as long as ten of these.
    return low + (high - low) * rng.random()


def _squash(image: Image.Image, size: int, resample: Image.Resampling) -> np.ndarray:
    return np.asarray(image.resize((size, size), resample))


def _middle(image: Image.Image, size: int, resample: Image.Resampling) -> np.ndarray:
    """Resizes and crops as torchvision's Resize(size) and CenterCrop(size), which OpenAI used."""
    image = _limit_aspect(image)
    width, height = image.size
    if width <= height:
        resized = (size, int(size * height / width))
    else:
        resized = (int(size * width / height), size)
    if resized != image.size:
        image = image.resize(resized, resample)
    left, top = (round((length - size) / 2) for length in resized)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _limit_aspect(image: Image.Image) -> Image.Image:
    longest = _MAX_ASPECT * min(image.size)
    if max(image.size) <= longest:
        return image
    width, height = (min(length, longest) for length in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
