"""clip_jax.data.images against NumPy arithmetic and hand-made files."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFilter

from clip_jax.data import images
from clip_jax.errors import BadExample

RNG = np.random.default_rng(0)


def encode(image: Image.Image, format_: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), np.uint8)


def photo(height: int, width: int) -> Image.Image:
    """Noise without the finest detail, as JPEG keeps it."""
    return Image.fromarray(noise(height, width)).filter(ImageFilter.GaussianBlur(3))


def decoded(data: bytes, **options) -> np.ndarray:
    image = images.decode(data, "key", **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha.astype(float)[..., None] / 255
    return colour * share + 255 * (1 - share)


def reason(data: bytes) -> str:
    with pytest.raises(BadExample) as caught:
        images.decode(data, "the key")
    assert caught.value.key == "the key"
    return caught.value.reason


@pytest.mark.parametrize("format_", ["PNG", "BMP", "TIFF", "WEBP"])
def test_rgb_is_kept(format_):
    pixels = noise(9, 7)
    data = encode(
        Image.fromarray(pixels), format_, **{"lossless": True} if format_ == "WEBP" else {}
    )
    np.testing.assert_array_equal(decoded(data), pixels)


@pytest.mark.parametrize("format_", ["PNG", "WEBP"])
def test_alpha_is_laid_over_white(format_):
    pixels = noise(8, 6, 4)
    pixels[:2, :, 3] = 0
    data = encode(Image.fromarray(pixels), format_, lossless=True, exact=True)
    expected = over_white(pixels[..., :3], pixels[..., 3])
    assert np.abs(decoded(data) - expected).max() <= 1
    assert (decoded(data)[:2] == 255).all()


def test_grey_with_alpha():
    pixels = noise(8, 6, 2)
    data = encode(Image.fromarray(pixels, "LA"), "PNG")
    expected = over_white(np.repeat(pixels[..., :1], 3, -1), pixels[..., 1])
    assert np.abs(decoded(data) - expected).max() <= 1


def test_grey_and_bilevel():
    grey = noise(8, 6, 1)[..., 0]
    np.testing.assert_array_equal(
        decoded(encode(Image.fromarray(grey), "PNG")), np.repeat(grey[..., None], 3, -1)
    )
    bits = Image.fromarray(grey > 127)
    np.testing.assert_array_equal(
        decoded(encode(bits, "PNG"))[..., 1], np.where(grey > 127, 255, 0)
    )


def test_palette_with_transparency():
    palette = noise(1, 4)[0]
    image = Image.new("P", (4, 1))
    image.putpalette(palette.tobytes())
    image.putdata([0, 1, 2, 3])
    expected = palette.copy()
    np.testing.assert_array_equal(decoded(encode(image, "PNG"))[0], expected)
    expected[2] = 255
    np.testing.assert_array_equal(decoded(encode(image, "PNG", transparency=2))[0], expected)
    expected = over_white(palette, np.array([0, 100, 200, 255]))
    data = encode(image, "PNG", transparency=bytes([0, 100, 200, 255]))
    assert np.abs(decoded(data)[0] - expected).max() <= 1


def test_colour_key_transparency():
    pixels = np.zeros((1, 3, 3), np.uint8)
    pixels[0, 1] = (10, 20, 30)
    data = encode(Image.fromarray(pixels), "PNG", transparency=(10, 20, 30))
    expected = pixels.copy()
    expected[0, 1] = 255
    np.testing.assert_array_equal(decoded(data), expected)


def test_cmyk_is_not_inverted():
    for cmyk, rgb in [((0, 0, 0, 0), (255,) * 3), ((255, 0, 0, 0), (0, 255, 255))]:
        data = encode(Image.new("CMYK", (16, 16), cmyk), "JPEG", quality=95)
        assert np.abs(decoded(data).astype(int) - rgb).max() <= 3


def test_sixteen_bit_grey_is_scaled():
    values = np.array([[0, 257, 128 * 257, 65535, 300]], np.uint16)
    result = decoded(encode(Image.fromarray(values), "PNG"))
    np.testing.assert_array_equal(result[..., 0], [[0, 1, 128, 255, 1]])


def test_float_pixels_are_refused():
    data = encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
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
    data = encode(Image.fromarray(np.ascontiguousarray(stored(upright))), "PNG", exif=exif)
    np.testing.assert_array_equal(decoded(data), upright)


def test_damaged_exif_is_ignored():
    data = encode(photo(20, 30), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03")
    assert decoded(data).shape == (20, 30, 3)


@pytest.mark.parametrize("format_", ["GIF", "WEBP", "PNG"])
def test_films_are_refused(format_):
    frames = [photo(20, 20) for _ in range(3)]
    assert reason(encode(frames[0], format_, save_all=True, append_images=frames[1:])) == (
        "animated image"
    )
    assert decoded(encode(frames[0], format_)).shape == (20, 20, 3)


def test_further_pictures_of_a_phone_are_no_film():
    pictures = [photo(20, 30), photo(10, 15)]
    data = encode(pictures[0], "MPO", save_all=True, append_images=pictures[1:])
    assert decoded(data).shape == (20, 30, 3)


def test_unreadable_images():
    whole = encode(photo(200, 300), "JPEG")
    page = b"<!DOCTYPE html><html><body>404</body></html>"
    png = encode(photo(20, 30), "PNG")
    for data in (b"", page, whole[: len(whole) // 2], png[:-40], whole[:10]):
        assert reason(data) == "unreadable image"


@pytest.mark.parametrize("side", [8_200, 30_000, 2**31 - 1])
def test_bombs_are_refused_from_the_header(side):
    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    data += chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    assert reason(data) == "too many pixels"


def test_shrinking_while_decoding_keeps_the_picture():
    data = encode(photo(1200, 1600), "JPEG", quality=95)
    full, shrunk = decoded(data), decoded(data, shrink_to=128)
    assert full.shape == (1200, 1600, 3)
    assert shrunk.shape == (300, 400, 3)  # a quarter: 256 or more on both sides
    small = [
        np.asarray(Image.fromarray(pixels).resize((171, 128), Image.Resampling.BICUBIC))
        for pixels in (full, shrunk)
    ]
    assert np.abs(small[0].astype(int) - small[1]).max() <= 3
    assert decoded(data, shrink_to=1000).shape == (1200, 1600, 3)


def reference_center(image: Image.Image, size: int) -> np.ndarray:
    """Resize(size, bicubic) and CenterCrop(size), step by step as OpenAI's evaluation does."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    long = int(size * long / short)
    width, height = (size, long) if width <= height else (long, size)
    image = image.resize((width, height), Image.BICUBIC)
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    return np.asarray(image)[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(300, 400), (401, 299), (224, 333), (57, 90), (640, 641)])
def test_center_matches_openai(shape):
    image = photo(*shape)
    result = images.resize_crop(image, 224, "center")
    assert result.shape == (224, 224, 3)
    assert np.abs(result.astype(int) - reference_center(image, 224)).max() <= 1


def test_extreme_proportions():
    for width, height in [(20_000, 1), (1, 20_000), (3, 500)]:
        image = Image.new("RGB", (width, height), (1, 2, 3))
        for crop in ("random", "center", "none"):
            result = images.resize_crop(image, 32, crop, np.random.default_rng(0))
            np.testing.assert_array_equal(result, np.broadcast_to([1, 2, 3], (32, 32, 3)))


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (40, 50), (1300, 1000)])
def test_random_window_is_a_window_of_the_resized_image(shape):
    image, size = photo(*shape), 64
    height, width = shape
    scale = size / min(shape)
    resized = image.resize((round(width * scale), round(height * scale)), Image.BICUBIC)
    resized = np.asarray(resized).astype(float)
    for seed in range(3):
        result = images.resize_crop(image, size, "random", np.random.default_rng(seed))
        errors = [
            np.abs(result - resized[top : top + size, left : left + size]).mean()
            for top in range(resized.shape[0] - size + 1)
            for left in range(resized.shape[1] - size + 1)
        ]
        # Windows begin between the pixels of the reference: up to half a pixel away.
        assert min(errors) < 0.5 * np.median(errors) or len(errors) == 1


def test_random_window_reaches_both_ends_and_follows_the_seed():
    ramp = np.broadcast_to(np.linspace(0, 255, 400)[None, :, None], (100, 400, 3)).astype(np.uint8)
    crops = [
        images.resize_crop(ramp, 50, "random", np.random.default_rng(seed)) for seed in range(200)
    ]
    starts = np.array([crop[0, 0, 0] for crop in crops])
    assert starts.min() < 5
    assert starts.max() > 255 * 0.74
    # Uniform over the 300 positions: quartiles of the ramp's first three quarters.
    np.testing.assert_allclose(np.quantile(starts, [0.25, 0.5, 0.75]), [48, 96, 143], atol=18)
    again = images.resize_crop(ramp, 50, "random", np.random.default_rng(7))
    np.testing.assert_array_equal(again, crops[7])


def test_none_keeps_the_whole_image():
    halves = np.zeros((40, 80, 3), np.uint8)
    halves[:, 40:] = 200
    result = images.resize_crop(halves, 20, "none")
    assert (result[:, :8] == 0).all()
    assert (result[:, 12:] == 200).all()


@pytest.mark.parametrize("crop", ["random", "center", "none"])
def test_image_of_the_right_size_is_untouched(crop):
    pixels = noise(32, 32)
    for image in (pixels, Image.fromarray(pixels)):
        result = images.resize_crop(image, 32, crop, np.random.default_rng(0))
        np.testing.assert_array_equal(result, pixels)
        assert result.dtype == np.uint8


def test_unknown_crop():
    with pytest.raises(ValueError, match="smart"):
        images.resize_crop(noise(8, 8), 4, "smart")
