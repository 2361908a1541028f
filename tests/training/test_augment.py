"""clip_jax.training.augment against Pillow's ImageEnhance, and the statistics of its draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from clip_jax import sharding
from clip_jax.training import augment

OFF = {
    "flip": 0.0,
    "jitter": 0.0,
    "brightness": 0.4,
    "contrast": 0.3,
    "saturation": 0.5,
    "grey": 0.0,
}
KEY = jax.random.key(3)


def settings(**overrides) -> FrozenConfigDict:
    return FrozenConfigDict({**OFF, **overrides})


FLIP, JITTER, GREY = settings(flip=0.5), settings(jitter=1.0), settings(grey=1.0)
ALL = settings(flip=0.5, jitter=0.5, grey=0.3)


def photos(count: int, height: int = 20, width: int = 26) -> np.ndarray:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, height, width, 3), np.uint8)
    blurred = [Image.fromarray(each).filter(ImageFilter.GaussianBlur(1)) for each in pixels]
    return np.stack([np.asarray(ImageOps.autocontrast(each)) for each in blurred])


COMPILED = jax.jit(augment.augment, static_argnames="config")


def run(images: np.ndarray, config: FrozenConfigDict, key: jax.Array = KEY) -> np.ndarray:
    return np.asarray(COMPILED(images, key, config=config))


def draws(count: int, config: FrozenConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Mirrored or not, and factors, of the first rows of a batch."""

    def draw(row):
        return augment._draw(jax.random.fold_in(KEY, row), config)

    flipped, factors = jax.jit(jax.vmap(draw))(jnp.arange(count))
    return np.asarray(flipped), np.asarray(factors)


def by_numpy(image: np.ndarray, flipped: bool, factors: np.ndarray) -> np.ndarray:
    """The definition, in float64."""
    weights = np.array([0.299, 0.587, 0.114])
    pixels = (image[:, ::-1] if flipped else image).astype(np.float64)
    brightness, contrast, saturation = factors.astype(np.float64)
    pixels = np.clip(pixels * brightness, 0, 255)
    mean = (pixels @ weights).mean()
    pixels = np.clip(mean + (pixels - mean) * contrast, 0, 255)
    grey = (pixels @ weights)[..., None]
    return np.clip(grey + (pixels - grey) * saturation, 0, 255)


def by_pillow(image: np.ndarray, flipped: bool, factors: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(image)
    if flipped:
        picture = ImageOps.mirror(picture)
    enhancers = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
    for enhancer, factor in zip(enhancers, factors):
        picture = enhancer(picture).enhance(float(factor))
    return np.asarray(picture)


@pytest.mark.parametrize("config", [FLIP, JITTER, GREY, ALL], ids=["flip", "jitter", "grey", "all"])
@pytest.mark.slow
def test_matches_numpy_and_pillow(config):
    images = photos(32)
    result = run(images, config)
    assert result.dtype == np.uint8
    changed = [*zip(images, *draws(32, config))]
    expected = np.stack([by_numpy(*each) for each in changed])
    np.testing.assert_allclose(result, expected, atol=0.501)
    # Pillow rounds down after every step.
    assert np.abs(result - np.stack([by_pillow(*each) for each in changed], dtype=int)).max() <= 3
    assert np.abs(result.astype(int) - images).mean() > 5  # something has been done


def test_mirrored_images_are_mirrored_exactly_and_the_others_are_untouched():
    images = photos(32)
    flipped, _ = draws(32, FLIP)
    assert 6 < flipped.sum() < 26
    result = run(images, FLIP)
    np.testing.assert_array_equal(result[flipped], images[flipped][:, :, ::-1])
    np.testing.assert_array_equal(result[~flipped], images[~flipped])


def test_what_chance_passes_over_is_untouched():
    images = photos(32)
    flipped, factors = draws(32, ALL)
    untouched = ~flipped & (factors == 1).all(1)
    assert 0 < untouched.sum() < 16
    same = (run(images, ALL) == images).all((1, 2, 3))
    np.testing.assert_array_equal(same, untouched)


def test_grey_has_equal_channels_and_keeps_brightness():
    images = photos(32)
    result = run(images, GREY)
    np.testing.assert_array_equal(result, np.repeat(result[..., :1], 3, -1))
    np.testing.assert_allclose(result[..., 0], images @ [0.299, 0.587, 0.114], atol=0.51)


def test_probabilities_and_ranges():
    config = ALL
    flipped, factors = draws(4000, config)
    np.testing.assert_allclose(flipped.mean(), 0.5, atol=0.03)
    grey = factors[:, 2] == 0
    np.testing.assert_allclose(grey.mean(), 0.3, atol=0.03)
    jittered = factors[:, 0] != 1
    np.testing.assert_allclose(jittered.mean(), 0.5, atol=0.03)
    np.testing.assert_array_equal(factors[:, 1] != 1, jittered)  # all or none
    changes = factors[jittered & ~grey] - 1
    strengths = np.array([config.brightness, config.contrast, config.saturation])
    assert (np.abs(changes) <= strengths * 1.0001).all()
    np.testing.assert_allclose(np.quantile(changes / strengths, 0.25, axis=0), -0.5, atol=0.06)
    np.testing.assert_allclose(np.quantile(changes / strengths, 0.75, axis=0), 0.5, atol=0.06)
    correlations = np.corrcoef([*changes.T, flipped[jittered & ~grey]])
    assert np.abs(correlations - np.eye(4)).max() < 0.1


def test_does_not_depend_on_the_devices():
    images = photos(32)
    mesh = sharding.make_mesh()
    assert mesh.size == 8
    split = jax.device_put(images, sharding.batch_sharding(mesh))
    np.testing.assert_array_equal(run(split, ALL), run(images, ALL))


def test_keys_decide():
    images = photos(32)
    np.testing.assert_array_equal(run(images, JITTER), run(images, JITTER))
    other = run(images, JITTER, jax.random.key(4))
    assert (run(images, JITTER) != other).any((1, 2, 3)).all()
    # Equal images of one batch differ too.
    same = run(np.broadcast_to(images[:1], images.shape), JITTER)
    assert len({each.tobytes() for each in same}) == 32


def test_floats_are_not_rounded():
    images = photos(32)
    result = run(images.astype(np.float32), JITTER)
    assert result.dtype == np.float32
    assert 0 <= result.min() < result.max() <= 255
    np.testing.assert_array_equal(np.round(result), run(images, JITTER))
    assert (np.round(result) != result).mean() > 0.5


def test_off_does_nothing():
    images = jnp.asarray(photos(2))
    assert augment.augment(images, KEY, settings()) is images
