"""The views of near-duplicate training against Pillow and matplotlib, a change at a time."""

import functools
import io

import jax
import jax.numpy as jnp
import matplotlib.colors
import numpy as np
import numpy_models
import pytest
import tiny
from ml_collections import FrozenConfigDict
from PIL import Image, ImageFilter, ImageOps

from clip_jax import models, sharding
from clip_jax.models import views

SIDE = 40
KEY = jax.random.key(3)
CONFIG = FrozenConfigDict(
    {
        "scale": (0.4, 1.0),
        "ratio": (3 / 4, 4 / 3),
        "angle": 10.0,
        "shrink": 0.5,
        "hue": 0.1,
        "saturation": 0.4,
        "value": 0.3,
        "quality": (30.0, 95.0),
    }
)
NOTHING = FrozenConfigDict(
    {
        **{"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "angle": 0.0, "shrink": 1.0},
        **{"hue": 0.0, "saturation": 0.0, "value": 0.0, "quality": (100.0, 100.0)},
    }
)


def photos(count: int) -> np.ndarray:
    """Smooth, colourful, of the full range."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)
    blurred = [Image.fromarray(each).filter(ImageFilter.GaussianBlur(2)) for each in pixels]
    return np.stack([np.asarray(ImageOps.autocontrast(each)) for each in blurred])


PHOTO = photos(1)[0]


def view(**changes) -> views.View:
    nothing = {"x": 0.5, "y": 0.5, "width": 1.0, "height": 1.0, "angle": 0.0, "side": SIDE}
    nothing |= {"down": 0, "up": 0, "hue": 0.0, "saturation": 1.0, "value": 1.0, "quality": 100}
    return views.View(**{**nothing, **changes})


def floats(image: np.ndarray) -> jax.Array:
    return jnp.asarray(image, jnp.float32)


@pytest.mark.parametrize(
    ("x", "y", "width", "height", "angle"),
    [(0.5, 0.5, 0.6, 0.6, 0.0), (0.55, 0.45, 0.7, 0.5, 0.15), (0.4, 0.6, 0.5, 0.7, -0.1)],
)
def test_windows_are_those_of_pillow(x, y, width, height, angle):
    found = views.cut_out(floats(PHOTO), view(x=x, y=y, width=width, height=height, angle=angle))
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.array([[cos * width, -sin * height], [sin * width, cos * height]])
    offset = SIDE * (np.array([x, y]) - matrix @ [0.5, 0.5])
    affine = (*matrix[0], offset[0], *matrix[1], offset[1])
    wanted = Image.fromarray(PHOTO).transform(
        (SIDE, SIDE), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR
    )
    # Pillow rounds; and a window that is turned sees the edge, which it leaves black.
    wanted = np.asarray(wanted, np.float32)
    inside = wanted.any(axis=2)
    assert inside.mean() > 0.98
    assert np.abs(np.asarray(found) - wanted)[inside].max() < 1.01


def test_the_edge_is_repeated():
    found = np.asarray(views.cut_out(floats(PHOTO), view(angle=0.15)))
    assert found.min() >= PHOTO.min()
    corner = np.abs(found[0, 0] - PHOTO[0, :8].astype(float)).sum(axis=1).min()
    assert corner < 60  # near some pixel of the upper edge, not black


PILLOW = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("side", "down", "up"), [(20, 0, 1), (27, 1, 2), (33, 2, 0), (40, 1, 1)])
def test_resizing_is_that_of_pillow(side, down, up):
    found = views.shrink(floats(PHOTO), jnp.float32(side), jnp.int32(down), jnp.int32(up))
    small = Image.fromarray(PHOTO).resize((side, side), PILLOW[down])
    wanted = small.resize((SIDE, SIDE), PILLOW[up])
    error = np.abs(np.asarray(found) - np.asarray(wanted, np.float32))
    assert error.mean() < 0.8
    assert error.max() < 4  # Pillow rounds, and cuts off what is too bright, after each direction
    assert (side == SIDE) == (np.abs(np.asarray(found) - PHOTO).max() < 1e-3)


@pytest.mark.parametrize(("hue", "saturation", "value"), [(0.1, 1.3, 0.8), (-0.3, 0.6, 1.4)])
def test_colours_are_those_of_hsv(hue, saturation, value):
    image = np.concatenate([PHOTO[:20], np.repeat(PHOTO[20:, :, :1], 3, axis=2)])  # half is grey
    image[0, 0] = 0
    found = views.recolour(floats(image), *map(jnp.float32, (hue, saturation, value)))
    hsv = matplotlib.colors.rgb_to_hsv(image / 255.0)
    hsv[..., 0] = (hsv[..., 0] + hue) % 1
    hsv[..., 1:] = np.clip(hsv[..., 1:] * [saturation, value], 0, 1)
    np.testing.assert_allclose(found, 255 * matplotlib.colors.hsv_to_rgb(hsv), atol=2e-3)


@pytest.mark.parametrize("quality", [20, 50, 75, 95])
def test_compression_is_that_of_jpeg(quality: int):
    found = np.asarray(views.compress(floats(PHOTO), jnp.float32(quality)))
    file = io.BytesIO()
    Image.fromarray(PHOTO).save(file, "JPEG", quality=quality, subsampling=0)
    wanted = np.asarray(Image.open(file), np.float32)
    lost = np.abs(wanted - PHOTO).mean()
    # A coefficient at the border of two steps may be rounded either way, and changes its block.
    error = np.abs(found - wanted)
    assert error.mean() < 0.1 * lost + 0.3
    assert np.quantile(error, 0.9) <= 2
    assert np.abs(found - PHOTO).mean() == pytest.approx(lost, rel=0.1)


COMPILED = jax.jit(views.two_views, static_argnames="config")


def test_nothing_drawn_leaves_the_image():
    images = photos(2)
    found = np.asarray(COMPILED(images, KEY, config=NOTHING), int)
    assert np.abs(found - images[:, None]).max() <= 4  # the rounding of JPEG's colours


def test_views_differ_and_do_not_depend_on_the_devices():
    images = np.repeat(photos(2), 4, axis=0)
    view = functools.partial(COMPILED, key=KEY, config=CONFIG, rows=jnp.arange(8))
    found = np.asarray(view(images))
    assert (found.shape, found.dtype) == ((8, 2, SIDE, SIDE, 3), np.uint8)
    assert len({each.tobytes() for each in found.reshape(16, -1)}) == 16
    mesh = sharding.make_mesh()
    split = jax.device_put(images, sharding.batch_sharding(mesh))
    spread = np.asarray(view(split), int)
    assert np.abs(spread - found).max() <= 1  # sums in another order
    # The number of an image decides, not its place.
    turned = view(images[::-1], rows=jnp.arange(8)[::-1])
    np.testing.assert_array_equal(turned[::-1], found)
    other = view(images, key=jax.random.key(4))
    assert (np.asarray(other) != found).any((2, 3, 4)).all()


def test_a_view_is_the_changes_in_turn():
    drawn = views.draw(KEY, CONFIG, SIDE)
    pixels = views.cut_out(floats(PHOTO), drawn)
    pixels = views.shrink(pixels, drawn.side, drawn.down, drawn.up)
    pixels = views.recolour(pixels, drawn.hue, drawn.saturation, drawn.value)
    wanted = np.asarray(views.compress(pixels, drawn.quality))
    np.testing.assert_array_equal(views.change(jnp.asarray(PHOTO), drawn), wanted)
    assert np.abs(wanted - PHOTO).mean() > 5


def test_what_is_drawn():
    draws = jax.vmap(functools.partial(views.draw, config=CONFIG, side=SIDE))
    drawn = jax.tree.map(np.asarray, jax.jit(draws)(jax.random.split(KEY, 4000)))
    area, ratio = drawn.width * drawn.height, drawn.width / drawn.height
    assert 0.38 < area.min() < 0.42
    assert 0.95 < area.max() <= 1
    assert 3 / 4 - 1e-3 <= ratio.min() < 0.77
    assert 1.3 < ratio.max() <= 4 / 3 + 1e-3
    for centre, extent in ((drawn.x, drawn.width), (drawn.y, drawn.height)):
        assert (centre - extent / 2).min() >= -1e-6  # a window lies within the image
        assert (centre + extent / 2).max() <= 1 + 1e-6
    assert np.abs(drawn.angle).max() == pytest.approx(np.radians(10), rel=0.01)
    assert set(drawn.side) == set(range(20, 41))
    for filter_ in (drawn.down, drawn.up):
        np.testing.assert_allclose(np.bincount(filter_) / 4000, 1 / 3, atol=0.03)
    for name, low, high in (
        ("hue", -0.1, 0.1),
        ("saturation", 0.6, 1.4),
        ("value", 0.7, 1.3),
        ("quality", 30, 95),
    ):
        values = getattr(drawn, name)
        edges = np.quantile(values, [0, 0.25, 0.75, 1])
        wanted = low + (high - low) * np.array([0, 0.25, 0.75, 1])
        np.testing.assert_allclose(edges, wanted, atol=0.03 * (high - low), err_msg=name)


def test_the_head_that_compares_views_equals_numpy():
    net = tiny.make_net("vit", {"views_mlp": 24, "views_embed": 8})
    batch = tiny.make_batch(net)
    batch["views"] = np.stack([batch["image"], batch["image"][:, ::-1]], axis=1)
    shapes = jax.eval_shape(net.init, KEY, batch["image"], batch["tokens"])
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: np.float32(rng.normal(size=leaf.shape) / 3), shapes)
    found = jax.jit(functools.partial(net.apply, method="outputs"))(variables, batch)["views"]
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    for number in range(2):
        x = numpy_models.vit_tokens(batch["views"][:, number], p["image"], 8)[:, 0]
        x = numpy_models.layer_norm(x, p["image"]["ln_post"])
        for layer in (1, 2):
            dense = p["view_head"][f"layer_{layer}"]
            x = numpy_models.layer_norm(
                x @ dense["kernel"] + dense["bias"], p["view_head"][f"ln_{layer}"]
            )
            x = np.maximum(x, 0)
        x = x @ p["view_head"]["layer_3"]["kernel"] + p["view_head"]["layer_3"]["bias"]
        np.testing.assert_allclose(found[:, number], numpy_models.unit(x), atol=1e-5)


def test_a_size_with_a_view_head_says_so():
    size = models.get_size("ViT-B/32", {"views_mlp": 4096, "views_embed": 256})
    assert str(size) == "ViT-B/32 (view head 4096 x 256)"
