"""Decodes image files to square uint8 pixels, in libraries that release the GIL.

Pillow reads every header and every unusual file. An ordinary JPEG is decoded by simplejpeg: the
same pixels from the same library beneath (libjpeg-turbo), without Pillow's copies.
"""

import contextlib
import functools
import io
import re
import struct
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from clip_jax.data import crops
from clip_jax.data.crops import Crop
from clip_jax.errors import BadExample

# Above this, a file is refused from its header alone: 8192 x 8192. Decoded, that takes up to 1.5 GB
# for a moment, in most formats 0.7 GB (benchmarks/decoders.py).
MAX_PIXELS = 2**26
# The formats that are opened. Pillow knows others, one of which starts a program (EPS).
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_TILE_WIDTH, _TILE_HEIGHT = 322, 323  # tags of TIFF
_TIFF_ORDERS = {b"II": "<", b"MM": ">"}
_TIFF_BYTES = (1, 2, 6, 7)  # types of text, profiles and the like, which are read in one piece
_MAX_TIFF_ENTRIES = 2**17  # such as strips: two for each of 65,536 rows
# A JPEG is decoded once per scan. Cameras and programs write at most a dozen.
_SCAN = b"\xff\xda"
_MAX_SCANNED = 32 * MAX_PIXELS  # pixels of all scans together
_BAND = 2**20  # pixels converted at a time, where a conversion takes memory of its own

# Formats of animations; further frames of other formats are previews, depth maps or pages.
_ANIMATED_FORMATS = ("GIF", "WEBP", "PNG", "AVIF")
_JPEG_FORMATS = ("JPEG", "MPO")  # MPO: with further pictures; written by phones

# Damaged metadata and large pictures are no news to the user; errors are counted. Pillow would
# print a line for each.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_HTML = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html|head|body|meta|script)\b", re.I)


def pixels(
    image: bytes | UInt8[np.ndarray, "h w 3"] | Image.Image,
    key: str,
    size: int,
    crop: Crop,
    rng: np.random.Generator | None,
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Converts an image to the pixels that the model takes.

    Transparent pixels are laid over white, 16-bit grey is scaled to 8, the EXIF orientation is
    applied. Resizing is bicubic with antialias. For a random crop, a JPEG is decoded at 1/2, 1/4
    or 1/8 of its resolution where the crop still has at least twice `size` pixels a side.

    Args:
      image: the bytes of a file in one of the usual formats, such as JPEG, PNG, WebP, AVIF, GIF,
        BMP or TIFF; or pixels; or a Pillow image.
      key: names the example in errors.
      size: pixels along a side of the result.
      crop: the part of the image that is kept.
      rng: draws a random crop; unused by others.

    Returns:
      The pixels; may be read-only.

    Raises:
      BadExample: "empty image file", "HTML instead of an image", "unreadable image",
        "too many pixels", "too many scans", "animated image" or "unsupported pixel format".
    """
    if isinstance(image, np.ndarray):
        if image.shape == (size, size, 3) and crop.name != "resized":
            return image
        image = Image.fromarray(image)
    with _reading(key):
        picture = _open(image, key) if isinstance(image, bytes) else image
        if not crop.is_random:
            return crops.fixed(_to_rgb(picture, key), size, crop)
        assert rng is not None, "a random crop needs an rng"
        if isinstance(image, bytes) and picture.format in _JPEG_FORMATS:
            window = crops.window(crop, *_upright_size(picture), rng)
            factor = window.shrink_factor(size)
            return crops.resize(_jpeg(image, picture, key, factor), window.shrunk(factor), size)
        rgb = _array(_to_rgb(picture, key))
        window = crops.window(crop, rgb.shape[1], rgb.shape[0], rng)
        return crops.resize(rgb, window, size)


def decode(data: bytes, key: str) -> Image.Image:
    """Decodes an image file to RGB at its full size; see `pixels`, also for the errors."""
    with _reading(key):
        return _to_rgb(_open(data, key), key)


def _to_rgb(image: Image.Image, key: str) -> Image.Image:
    """Converts any Pillow image to upright RGB, as `pixels` describes; may raise BadExample."""
    image = _upright(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _grey16_to_rgb(image, key)
    if image.mode in ("F", "LAB", "HSV"):  # TIFF only; the range of their values is anyone's guess
        raise BadExample("unsupported pixel format", key, image.mode)
    if image.has_transparency_data:
        return _over_white(image)
    return image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    """Lays an image with transparency over white, band by band."""
    laid = Image.new("RGB", image.size)
    for top, bottom in _bands(image.size):
        band = image.crop((0, top, image.width, bottom)).convert("RGBA")
        white = Image.new("RGBA", band.size, "white")
        laid.paste(Image.alpha_composite(white, band).convert("RGB"), (0, top))
    return laid


def _bands(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yields first and last row, exclusive, of bands of an image of this width and height."""
    width, height = size
    rows = max(1, _BAND // max(1, width))
    for top in range(0, height, rows):
        yield top, min(top + rows, height)


@contextlib.contextmanager
def _reading(key: str) -> Iterator[None]:
    """Turns every error of a file into a BadExample."""
    try:
        yield
    except (BadExample, AssertionError):
        raise
    except Image.DecompressionBombError as error:
        raise BadExample("too many pixels", key, str(error)) from None
    except UnidentifiedImageError:  # its text is only the address of a buffer
        raise BadExample("unreadable image", key, "no known image format") from None
    # Damaged files make Pillow raise anything from EOFError to struct.error.
    except Exception as error:
        raise BadExample("unreadable image", key, f"{type(error).__name__}: {error}") from None


def _open(data: bytes, key: str) -> Image.Image:
    """Reads the header; refuses files that need not be decoded."""
    if not data:
        raise BadExample("empty image file", key)
    if _HTML.match(data):
        raise BadExample("HTML instead of an image", key)
    if data.startswith((b"P1", b"P2", b"P3")):  # decoded by Python: half a minute for 100 MB
        raise BadExample("unreadable image", key, "a PPM of decimal numbers")
    if (entries := _tiff_entries(data)) > _MAX_TIFF_ENTRIES:
        raise BadExample("unreadable image", key, f"a TIFF of {entries} strips")
    image = open_header(data)
    width, height = image.size
    _check_pixels(width, height, key)
    if image.format in _JPEG_FORMATS:
        scans = data.count(_SCAN)
        if scans * width * height > _MAX_SCANNED:
            raise BadExample("too many scans", key, f"{scans} of {width} x {height}")
    if image.format == "TIFF":  # tiles are decoded whole, however small the image is
        _check_pixels(_number(image, _TILE_WIDTH), _number(image, _TILE_HEIGHT), key)
    if image.format in _ANIMATED_FORMATS and getattr(image, "is_animated", False):
        raise BadExample("animated image", key)
    return image


def _check_pixels(width: int, height: int, key: str) -> None:
    if width * height > MAX_PIXELS:
        raise BadExample("too many pixels", key, f"{width} x {height}")


def _tiff_entries(data: bytes) -> int:
    """Returns the most values that a tag of a TIFF has, which Pillow reads one by one; 0: none."""
    order = _TIFF_ORDERS.get(data[:2])
    if order is None or len(data) < 16:
        return 0
    big = struct.unpack_from(order + "H", data, 2)[0] == 43
    place, count, step, number = ("Q", "Q", 20, "Q") if big else ("I", "H", 12, "I")
    (first,) = struct.unpack_from(order + place, data, 8 if big else 4)
    try:
        (tags,) = struct.unpack_from(order + count, data, first)
        starts = range(first + struct.calcsize(count) + 4, len(data), step)[:tags]
        found = [struct.unpack_from(f"{order}H{number}", data, start - 2) for start in starts]
    except (struct.error, OverflowError):
        return 0  # Pillow says that it is cut
    return max((entries for kind, entries in found if kind not in _TIFF_BYTES), default=0)


def _number(image: Any, tag: int) -> int:
    """Returns a number of a TIFF's header: 1 where there is none, too large where it is damaged."""
    value = image.tag_v2.get(tag, 1)
    return value if isinstance(value, int) else MAX_PIXELS + 1


def open_header(data: bytes) -> Image.Image:
    """Opens an image file of a known format, whose pixels are not decoded yet.

    Nothing else opens files by Pillow, so that no bytes of a data set reach its other decoders.
    Raises whatever Pillow raises for a damaged header.
    """
    return Image.open(io.BytesIO(data), formats=_formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()  # AVIF is not in every version
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _jpeg(data: bytes, picture: Image.Image, key: str, factor: int) -> np.ndarray:
    """Decodes a JPEG at 1 / factor of its sides, rounded up: upright, uint8 [h, w, 3].

    Args:
      data: the file.
      picture: the same, opened and not yet decoded.
      key: names the example in errors.
      factor: 1, 2, 4 or 8.
    """
    if picture.mode in ("RGB", "L") and _orientation(picture) == 1:
        width, height = (-(-length // factor) for length in picture.size)
        # Its errors may be harmless, or mean that the file ends too early: Pillow can tell.
        with contextlib.suppress(ValueError):
            return simplejpeg.decode_jpeg(
                data, min_width=width, min_height=height, min_factor=factor, strict=True
            )
    picture.draft(None, (picture.width // factor, picture.height // factor))
    return _array(_to_rgb(picture, key))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, upright, where there is none or it is damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation; an image with damaged EXIF data is returned unchanged."""
    image.load()  # outside of the try: errors of the pixels are none of EXIF
    if _orientation(image) == 1:
        return image  # exif_transpose would copy it
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _array(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the pixels of an RGB image, which may be read-only; a large one band by band."""
    if image.width * image.height <= _BAND:
        return np.asarray(image)
    array = np.empty((image.height, image.width, 3), np.uint8)
    for top, bottom in _bands(image.size):
        array[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    return array


def _grey16_to_rgb(image: Image.Image, key: str) -> Image.Image:
    grey = np.empty((image.height, image.width), np.uint8)
    for top, bottom in _bands(image.size):
        values = np.asarray(image.crop((0, top, image.width, bottom))).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BadExample("unsupported pixel format", key, f"{image.mode} beyond 16 bits")
        grey[top:bottom] = np.round(values / 257)  # 65535 -> 255
    return Image.fromarray(grey).convert("RGB")
