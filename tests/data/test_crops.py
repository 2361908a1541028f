"""clip_jax.data.crops: where the windows lie, and what becomes of them, against Pillow."""

import dataclasses
import math

import numpy as np
import pytest
from PIL import Image, ImageFilter

from clip_jax.choices import CROPS
from clip_jax.data import crops, images
from clip_jax.data.crops import Crop, Window
from clip_jax.errors import UserError

RNG = np.random.default_rng(0)


def photo(height: int, width: int) -> Image.Image:
    pixels = RNG.integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(3))


def draw(crop: Crop, width: int, height: int, count: int) -> np.ndarray:
    """Windows by their left, top, width, height: int [count, 4]."""
    rng = np.random.default_rng(1)
    drawn = [crops.window(crop, width, height, rng) for _ in range(count)]
    return np.array([dataclasses.astuple(window) for window in drawn])


@pytest.mark.parametrize("simd", [True, False])
@pytest.mark.parametrize("size", [32, 100, 224])
def test_resize_matches_pillow(size, simd, monkeypatch):
    if not simd:
        monkeypatch.setattr(crops, "simd", None)  # as on ARM Linux
    image = photo(120, 160)
    for window in (Window(0, 0, 160, 120), Window(31, 7, 100, 100), Window(158, 118, 2, 2)):
        left, top, width, height = dataclasses.astuple(window)
        box = (left, top, left + width, top + height)
        result = crops.resize(np.asarray(image), window, size)
        cut = image.crop(box)
        expected = np.asarray(cut.resize((size, size), Image.Resampling.BICUBIC))
        assert result.shape == (size, size, 3)
        assert np.abs(result.astype(int) - expected).max() <= 2


def test_shrinking_does_not_alias():
    """A chequered board becomes grey, not a coarser pattern."""
    board = np.indices((300, 300)).sum(0) % 2 * 255
    board = np.repeat(board[..., None], 3, -1).astype(np.uint8)
    result = crops.resize(board, Window(0, 0, 300, 300), 110).astype(int)
    assert np.abs(result[2:-2, 2:-2] - 127.5).max() < 8


def test_random_window_reaches_both_ends_and_follows_the_seed():
    windows = draw(Crop("random"), 400, 100, 4000)
    assert (windows[:, 2:] == 100).all()
    assert (windows[:, 1] == 0).all()
    left = windows[:, 0]
    assert left.min() == 0
    assert left.max() == 300
    np.testing.assert_allclose(np.quantile(left, [0.25, 0.5, 0.75]), [75, 150, 225], atol=10)
    np.testing.assert_array_equal(windows[:10], draw(Crop("random"), 400, 100, 10))
    assert (draw(Crop("random"), 100, 400, 20)[:, 0] == 0).all()


def test_random_window_is_a_window_of_the_image_resized_by_its_shorter_side():
    image, size = photo(130, 170), 64
    resized = image.resize((round(170 * 64 / 130), 64), Image.Resampling.BICUBIC)
    resized = np.asarray(resized).astype(float)
    for seed in range(5):
        result = images.pixels(image, "key", size, Crop("random"), np.random.default_rng(seed))
        columns = range(resized.shape[1] - size + 1)
        errors = [np.abs(result - resized[:, left : left + size]).mean() for left in columns]
        # Windows begin between the pixels of the reference: up to half a pixel away.
        assert min(errors) < 0.5 * np.median(errors)


def test_resized_window_keeps_to_its_ranges():
    crop = Crop("resized", scale=(0.2, 0.6), ratio=(0.5, 2.0))
    left, top, width, height = draw(crop, 400, 300, 4000).T
    fraction = width * height / (400 * 300)
    assert fraction.min() > 0.195
    assert fraction.max() < 0.605
    np.testing.assert_allclose(fraction.mean(), 0.39, atol=0.02)  # large ones fit less often
    ratio = np.log(width / height)
    assert np.abs(ratio).max() < math.log(2) + 0.02
    np.testing.assert_allclose(ratio.mean(), 0.04, atol=0.06)
    assert (left + width).max() == 400
    assert (top + height).max() == 300
    assert min(left.min(), top.min()) == 0


def test_resized_window_is_distributed_as_torchvision_has_it():
    """Its rejection sampling, written out; compares the mean and spread of all four numbers."""
    crop = Crop("resized", scale=(0.3, 1.0))
    rng = np.random.default_rng(5)

    def reference() -> tuple[int, int, int, int]:
        for _ in range(10):
            area = 200 * 300 * rng.uniform(0.3, 1.0)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if w <= 300 and h <= 200:
                return rng.integers(301 - w), rng.integers(201 - h), w, h
        return 17, 0, 267, 200

    expected = np.array([reference() for _ in range(6000)])
    drawn = draw(crop, 300, 200, 6000)
    error = expected.std(0) / math.sqrt(3000)
    assert (np.abs(drawn.mean(0) - expected.mean(0)) < 4 * error).all()
    np.testing.assert_allclose(drawn.std(0), expected.std(0), rtol=0.06)


def test_resized_window_where_nothing_fits_is_the_middle():
    windows = draw(Crop("resized", scale=(1.0, 1.0)), 1000, 30, 20)
    np.testing.assert_array_equal(windows, np.broadcast_to([480, 0, 40, 30], windows.shape))
    windows = draw(Crop("resized", scale=(1.0, 1.0)), 30, 1000, 20)
    np.testing.assert_array_equal(windows, np.broadcast_to([0, 480, 30, 40], windows.shape))


def test_whole_image_where_scale_and_ratio_leave_no_choice():
    windows = draw(Crop("resized", scale=(1.0, 1.0), ratio=(2.0, 2.0)), 80, 40, 5)
    np.testing.assert_array_equal(windows, np.broadcast_to([0, 0, 80, 40], windows.shape))


@pytest.mark.parametrize("name", CROPS)
@pytest.mark.parametrize("shape", [(20_000, 1), (1, 20_000), (3, 500), (1, 1)])
def test_extreme_proportions(name, shape):
    image = Image.new("RGB", shape, (1, 2, 3))
    result = images.pixels(image, "key", 32, Crop(name), np.random.default_rng(0))
    np.testing.assert_array_equal(result, np.broadcast_to([1, 2, 3], (32, 32, 3)))


def test_none_keeps_the_whole_image():
    halves = np.zeros((40, 80, 3), np.uint8)
    halves[:, 40:] = 200
    result = images.pixels(halves, "key", 20, Crop("none"), None)
    assert (result[:, :8] == 0).all()
    assert (result[:, 12:] == 200).all()


@pytest.mark.parametrize(
    ("side", "factor"), [(100, 1), (255, 1), (256, 2), (511, 2), (512, 4), (1024, 8), (9000, 8)]
)
def test_shrink_factor_keeps_twice_the_pixels(side, factor):
    assert Window(0, 0, side, 2 * side).shrink_factor(64) == factor
    assert Window(0, 0, 2 * side, side).shrink_factor(64) == factor


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "smart"}, "'smart'.*random, resized, center, none"),
        ({"name": "resized", "scale": (0.0, 1.0)}, "scale"),
        ({"name": "resized", "scale": (0.9, 0.5)}, "scale"),
        ({"name": "resized", "scale": (0.9, 1.5)}, "scale"),
        ({"name": "resized", "ratio": (0.0, 1.0)}, "ratio"),
        ({"name": "resized", "ratio": (2.0, 1.0)}, "ratio"),
    ],
)
def test_impossible_crops(options, message):
    with pytest.raises(UserError, match=message):
        Crop(**options)
