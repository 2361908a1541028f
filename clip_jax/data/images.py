"""Image files to square uint8 pixels, with Pillow, which releases the GIL while it works."""

import io

import numpy as np
from PIL import Image, ImageOps

from clip_jax.errors import BadExample

# Above this, a file is refused from its header alone. 8192 x 8192; decoded, 200 MB per thread.
MAX_PIXELS = 2**26

# These formats hold films; the others' further frames are previews, depth maps or pages.
_FILM_FORMATS = ("GIF", "WEBP", "PNG", "AVIF")

# Wider than this, an image is cut to it before it is resized by its shorter side: a 10,000 x 1
# line would become two million pixels wide.
_MAX_ASPECT = 16


def decode(data: bytes, key: str, shrink_to: int = 0) -> Image.Image:
    """Decodes an image file.

    Transparent pixels are laid over white, 16-bit grey is scaled to 8, the EXIF orientation is
    applied.

    Args:
      data: the bytes of a JPEG, PNG, WebP or whatever else Pillow reads.
      key: names the example in errors.
      shrink_to: if not 0, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its resolution (much
        faster) as long as both sides keep twice this many pixels.

    Returns:
      An RGB image.

    Raises:
      BadExample: "unreadable image", "too many pixels", "animated image" or
        "unsupported pixel format".
    """
    try:
        image = Image.open(io.BytesIO(data))
        _refuse(image, key)
        if shrink_to:
            image.draft(None, (2 * shrink_to, 2 * shrink_to))
        image.load()
        return to_rgb(image, key)
    except BadExample:
        raise
    except Image.DecompressionBombError as error:
        raise BadExample("too many pixels", key, str(error)) from None
    except (
        Exception
    ) as error:  # damaged files make Pillow raise anything from EOFError to struct.error
        raise BadExample("unreadable image", key, f"{type(error).__name__}: {error}") from None


def resize_crop(
    image: Image.Image | np.ndarray,
    size: int,
    crop: str,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Cuts and resizes to a square; bicubic with antialias throughout.

    Args:
      image: RGB, or uint8 [h, w, 3].
      size: pixels along a side of the result.
      crop: "random": a random square window of the image resized by its shorter side (the
        paper's only augmentation, section 2.4); "center": the middle one, as OpenAI's
        preprocessing for evaluation has it; "none": the whole image resized to a square,
        whatever its proportions.
      rng: places the random window; unused otherwise.

    Returns:
      uint8 [size, size, 3].
    """
    if isinstance(image, np.ndarray):
        if image.shape == (size, size, 3):
            return image
        image = Image.fromarray(image)
    if image.size == (size, size):
        pass
    elif crop == "random":
        assert rng is not None, "a random window needs an rng"
        image = _random_window(image, size, rng)
    elif crop == "center":
        image = _middle_window(image, size)
    elif crop == "none":
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    else:
        raise ValueError(f'crop must be "random", "center" or "none", not {crop!r}')
    return np.asarray(image)


def _random_window(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Resizes only the window that is kept: the same pixels for a fraction of the work."""
    side = min(image.size)
    left, top = (rng.uniform(0, length - side) for length in image.size)
    return image.resize(
        (size, size),
        Image.Resampling.BICUBIC,
        box=(left, top, left + side, top + side),
        reducing_gap=3.0,  # first averages whole pixels, only where it shrinks more than 3-fold
    )


def _middle_window(image: Image.Image, size: int) -> Image.Image:
    """Rounds as torchvision's Resize(size) and CenterCrop(size) do, which OpenAI used."""
    image = _limit_aspect(image)
    width, height = image.size
    if width <= height:
        resized = (size, int(size * height / width))
    else:
        resized = (int(size * width / height), size)
    if resized != image.size:
        image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (round((length - size) / 2) for length in resized)
    return image.crop((left, top, left + size, top + size))


def _limit_aspect(image: Image.Image) -> Image.Image:
    longest = _MAX_ASPECT * min(image.size)
    if max(image.size) <= longest:
        return image
    width, height = (min(length, longest) for length in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _refuse(image: Image.Image, key: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadExample("too many pixels", key, f"{width} x {height}")
    if image.format in _FILM_FORMATS and getattr(image, "is_animated", False):
        raise BadExample("animated image", key)


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation; an image with damaged EXIF data stays as it is."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def to_rgb(image: Image.Image, key: str = "image") -> Image.Image:
    """Any Pillow image upright and in RGB, as `decode` describes; BadExample where it cannot."""
    image = _upright(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _grey16_to_rgb(image, key)
    if image.mode in ("F", "LAB", "HSV"):  # TIFF only; the range of their values is anyone's guess
        raise BadExample("unsupported pixel format", key, image.mode)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _grey16_to_rgb(image: Image.Image, key: str) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadExample("unsupported pixel format", key, f"{image.mode} beyond 16 bits")
    grey = np.round(values / 257).astype(np.uint8)  # 65535 -> 255
    return Image.fromarray(grey).convert("RGB")
