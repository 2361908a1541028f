"""clip_jax.data.images against Pillow, NumPy arithmetic and hand-made files."""

import dataclasses
import io
import struct
import types
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageFilter, ImageOps
from tiny_data import encoded

from clip_jax.data import crops, images
from clip_jax.data.crops import Crop
from clip_jax.errors import BadExample

RNG = np.random.default_rng(0)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), np.uint8)


def photo(height: int, width: int) -> Image.Image:
    """Noise without the finest detail, as JPEG keeps it."""
    return Image.fromarray(noise(height, width)).filter(ImageFilter.GaussianBlur(3))


def decoded(data: bytes) -> np.ndarray:
    image = images.decode(data, "key")
    assert image.mode == "RGB"
    return np.asarray(image)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    opacity = alpha.astype(float)[..., None] / 255
    return colour * opacity + 255 * (1 - opacity)


def reason(data: bytes) -> str:
    with pytest.raises(BadExample) as caught:
        images.decode(data, "the key")
    assert caught.value.key == "the key"
    return caught.value.reason


@pytest.mark.parametrize("format_", ["PNG", "BMP", "TIFF", "WEBP"])
def test_rgb_is_kept(format_):
    pixels = noise(9, 7)
    data = encoded(
        Image.fromarray(pixels), format_, **{"lossless": True} if format_ == "WEBP" else {}
    )
    np.testing.assert_array_equal(decoded(data), pixels)


@pytest.mark.parametrize("format_", ["PNG", "WEBP"])
def test_alpha_is_laid_over_white(format_):
    pixels = noise(8, 6, 4)
    pixels[:2, :, 3] = 0
    data = encoded(Image.fromarray(pixels), format_, lossless=True, exact=True)
    expected = over_white(pixels[..., :3], pixels[..., 3])
    assert np.abs(decoded(data) - expected).max() <= 1
    assert (decoded(data)[:2] == 255).all()


def test_grey_with_alpha():
    pixels = noise(8, 6, 2)
    data = encoded(Image.fromarray(pixels, "LA"), "PNG")
    expected = over_white(np.repeat(pixels[..., :1], 3, -1), pixels[..., 1])
    assert np.abs(decoded(data) - expected).max() <= 1


def test_grey_and_bilevel():
    grey = noise(8, 6, 1)[..., 0]
    np.testing.assert_array_equal(
        decoded(encoded(Image.fromarray(grey), "PNG")), np.repeat(grey[..., None], 3, -1)
    )
    bits = Image.fromarray(grey > 127)
    np.testing.assert_array_equal(
        decoded(encoded(bits, "PNG"))[..., 1], np.where(grey > 127, 255, 0)
    )


def test_palette_with_transparency():
    palette = noise(1, 4)[0]
    image = Image.new("P", (4, 1))
    image.putpalette(palette.tobytes())
    image.putdata([0, 1, 2, 3])
    expected = palette.copy()
    np.testing.assert_array_equal(decoded(encoded(image, "PNG"))[0], expected)
    expected[2] = 255
    np.testing.assert_array_equal(decoded(encoded(image, "PNG", transparency=2))[0], expected)
    expected = over_white(palette, np.array([0, 100, 200, 255]))
    data = encoded(image, "PNG", transparency=bytes([0, 100, 200, 255]))
    assert np.abs(decoded(data)[0] - expected).max() <= 1


def test_colour_key_transparency():
    pixels = np.zeros((1, 3, 3), np.uint8)
    pixels[0, 1] = (10, 20, 30)
    data = encoded(Image.fromarray(pixels), "PNG", transparency=(10, 20, 30))
    expected = pixels.copy()
    expected[0, 1] = 255
    np.testing.assert_array_equal(decoded(data), expected)


def test_cmyk_is_not_inverted():
    for cmyk, rgb in [((0, 0, 0, 0), (255,) * 3), ((255, 0, 0, 0), (0, 255, 255))]:
        data = encoded(Image.new("CMYK", (16, 16), cmyk), "JPEG", quality=95)
        assert np.abs(decoded(data).astype(int) - rgb).max() <= 3


def test_sixteen_bit_grey_is_scaled():
    values = np.array([[0, 257, 128 * 257, 65535, 300]], np.uint16)
    result = decoded(encoded(Image.fromarray(values), "PNG"))
    np.testing.assert_array_equal(result[..., 0], [[0, 1, 128, 255, 1]])


def test_float_pixels_are_refused():
    data = encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    assert reason(data) == "unsupported pixel format"


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (1, lambda x: x),
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (4, lambda x: x[::-1]),
        (5, lambda x: x.transpose(1, 0, 2)),
        (6, lambda x: np.rot90(x, 1)),
        (7, lambda x: np.rot90(x, 2).transpose(1, 0, 2)),
        (8, lambda x: np.rot90(x, 3)),
    ],
)
def test_exif_orientation(orientation, stored):
    upright = noise(6, 9)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored(upright))), "PNG", exif=exif)
    np.testing.assert_array_equal(decoded(data), upright)


def test_damaged_exif_is_ignored():
    data = encoded(photo(20, 30), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03")
    assert decoded(data).shape == (20, 30, 3)


@pytest.mark.parametrize("format_", ["GIF", "WEBP", "PNG"])
def test_films_are_refused(format_):
    frames = [photo(20, 20) for _ in range(3)]
    assert reason(encoded(frames[0], format_, save_all=True, append_images=frames[1:])) == (
        "animated image"
    )
    assert decoded(encoded(frames[0], format_)).shape == (20, 20, 3)


def test_further_pictures_of_a_phone_are_no_film():
    pictures = [photo(20, 30), photo(10, 15)]
    data = encoded(pictures[0], "MPO", save_all=True, append_images=pictures[1:])
    assert decoded(data).shape == (20, 30, 3)
    result = images.pixels(data, "key", 20, Crop("random"), np.random.default_rng(0))
    assert np.abs(result - pillow_crop(upright(data), 20, Crop("random"), 0)).max() <= 2


def test_unreadable_images():
    whole = encoded(photo(200, 300), "JPEG")
    png = encoded(photo(20, 30), "PNG")
    svg = b'<?xml version="1.0"?><svg width="10" height="10"></svg>'
    for data in (svg, png[:-40], whole[:10], b"\0" * 1000):
        assert reason(data) == "unreadable image"


def test_empty_file():
    assert reason(b"") == "empty image file"


@pytest.mark.parametrize(
    "page",
    [
        b"<!DOCTYPE html><html><body>404</body></html>",
        b"\n\t <html lang=en>",
        b"\xef\xbb\xbf<!doctype  HTML PUBLIC>",
        b"<script>location = 'login'</script>",
    ],
)
def test_web_pages(page):
    assert reason(page) == "HTML instead of an image"


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpegs_that_end_too_early(options):
    """Whatever decodes them; a half-grey picture would be worse than none."""
    whole = encoded(photo(200, 300), "JPEG", **options)
    for fraction in (0.2, 0.5, 0.9, 0.99):
        cut = whole[: int(fraction * len(whole))]
        assert reason(cut) == "unreadable image"
        for crop in ("random", "resized", "center", "none"):
            with pytest.raises(BadExample, match="unreadable image"):
                images.pixels(cut, "key", 32, Crop(crop), np.random.default_rng(0))


@pytest.mark.parametrize("side", [8_200, 30_000, 2**31 - 1])
def test_bombs_are_refused_from_the_header(side):
    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    data += chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    assert reason(data) == "too many pixels"


def upright(data: bytes) -> Image.Image:
    """Decodes and rotates an image with Pillow only."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def pillow_crop(image: Image.Image, size: int, crop: Crop, seed: int, grid: int = 1) -> np.ndarray:
    """Crops at random, in multiples of `grid`, with Pillow only: float [size, size, 3]."""
    window = crops.window(crop, *image.size, np.random.default_rng(seed))
    left, top, width, height = (each // grid * grid for each in dataclasses.astuple(window))
    box = (left, top, left + width, top + height)
    resized = image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(resized).astype(float)


@pytest.fixture
def fast_decodes(monkeypatch) -> list[int]:
    """Grows by one for every JPEG that simplejpeg decodes."""
    done: list[int] = []

    def decode_jpeg(data, **options):
        result = simplejpeg.decode_jpeg(data, **options)
        done.append(len(data))
        return result

    monkeypatch.setattr(images, "simplejpeg", types.SimpleNamespace(decode_jpeg=decode_jpeg))
    return done


JPEGS = {
    "usual": ("RGB", {}, True),
    "progressive": ("RGB", {"progressive": True}, True),
    "4:4:4": ("RGB", {"subsampling": "4:4:4"}, True),
    "4:2:2": ("RGB", {"subsampling": "4:2:2"}, True),
    "stored as RGB": ("RGB", {"keep_rgb": True}, True),
    "grey": ("L", {}, True),
    "CMYK": ("CMYK", {}, False),
    "EXIF, upright": ("RGB", {"exif": {0x0112: 1, 0x010F: "maker"}}, True),
    "EXIF, damaged": ("RGB", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03"}, True),
    "EXIF, mirrored": ("RGB", {"exif": {0x0112: 2}}, False),
    "EXIF, on its side": ("RGB", {"exif": {0x0112: 6}}, False),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("name", ["random", "resized"])
def test_random_crops_of_jpegs_match_pillow(kind, name, fast_decodes):
    mode, options, is_fast = JPEGS[kind]
    if isinstance(options.get("exif"), dict):
        exif = Image.Exif()
        exif.update(options["exif"])
        options = {**options, "exif": exif}
    data = encoded(photo(150, 231).convert(mode), "JPEG", **options)
    image = Image.open(io.BytesIO(data)).convert("RGB") if "damaged" in kind else upright(data)
    crop = Crop(name, scale=(0.3, 1.0))
    for size, seed in ((64, 0), (100, 1), (224, 2)):  # from smaller to larger
        result = images.pixels(data, "key", size, crop, np.random.default_rng(seed))
        assert result.dtype == np.uint8
        assert np.abs(result - pillow_crop(image, size, crop, seed)).max() <= 2
    assert len(fast_decodes) == (3 if is_fast else 0)


@pytest.mark.parametrize("format_", ["PNG", "WEBP", "BMP"])
def test_random_crops_of_other_formats_match_pillow(format_):
    data = encoded(photo(90, 120), format_)
    for seed in range(3):
        result = images.pixels(data, "key", 48, Crop("random"), np.random.default_rng(seed))
        expected = pillow_crop(upright(data), 48, Crop("random"), seed)
        assert np.abs(result - expected).max() <= 2


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
@pytest.mark.parametrize(("shape", "factor"), [((1201, 1603), 4), ((511, 900), 1), ((512, 900), 2)])
def test_large_jpegs_are_decoded_smaller(mode, shape, factor, monkeypatch):
    """A quarter of 1201 pixels is twice the 128 that are wanted, an eighth is not."""
    decoded_shapes = []
    resize = crops.resize
    monkeypatch.setattr(
        crops,
        "resize",
        lambda image, *rest: decoded_shapes.append(image.shape) or resize(image, *rest),
    )
    data = encoded(photo(*shape).convert(mode), "JPEG", quality=95)
    result = images.pixels(data, "key", 128, Crop("random"), np.random.default_rng(0))
    assert decoded_shapes == [(*(-(-side // factor) for side in shape), 3)]
    expected = pillow_crop(upright(data), 128, Crop("random"), 0, grid=factor)
    assert np.abs(result - expected).max() <= 3
    assert np.abs(result - expected).mean() < 0.6


def test_harmless_complaints_of_the_decoder_lose_nothing(fast_decodes):
    """Bytes before a restart marker: simplejpeg refuses, Pillow reads on."""
    data = encoded(photo(40, 60), "JPEG", restart_marker_rows=1)
    odd = data.replace(b"\xff\xd0", b"\0\0\0\xff\xd0")
    with pytest.raises(ValueError, match="extraneous bytes"):
        simplejpeg.decode_jpeg(odd)
    result = images.pixels(odd, "key", 32, Crop("random"), np.random.default_rng(0))
    assert np.abs(result - pillow_crop(upright(data), 32, Crop("random"), 0)).max() <= 2
    assert not fast_decodes


def reference_center(image: Image.Image, size: int) -> np.ndarray:
    """Resize(size, bicubic) and CenterCrop(size), step by step as OpenAI's evaluation does."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    long = int(size * long / short)
    width, height = (size, long) if width <= height else (long, size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    return np.asarray(image)[top : top + size, left : left + size]


@pytest.mark.parametrize(
    "shape", [(300, 400), (401, 299), (224, 333), (57, 90), (640, 641), (1300, 900)]
)
def test_evaluation_matches_openai_exactly(shape):
    data = encoded(photo(*shape), "JPEG")
    image = upright(data)
    for given in (data, image, np.asarray(image)):
        result = images.pixels(given, "key", 224, crops.CENTER, None)
        np.testing.assert_array_equal(result, reference_center(image, 224))
        result = images.pixels(given, "key", 224, Crop("none"), None)
        squashed = image.resize((224, 224), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(result, np.asarray(squashed))


@pytest.mark.parametrize("crop", ["random", "center", "none"])
def test_image_of_the_right_size_is_untouched(crop):
    expected = noise(32, 32)
    image = Image.fromarray(expected)
    for given in (expected, image, encoded(image, "PNG")):
        result = images.pixels(given, "key", 32, Crop(crop), np.random.default_rng(0))
        np.testing.assert_array_equal(result, expected)
        assert result.dtype == np.uint8
