"""Shapes, initialisation and mathematics of the models, against the paper's numbers and NumPy."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy_models
import pytest
from flax import linen as nn

from clip_jax import losses, models, sharding
from clip_jax.errors import UserError
from clip_jax.models import clip, layers, transformer

PARAMETERS = {
    "RN50": 102_007_137,
    "RN101": 119_688_033,
    "RN50x4": 178_300_601,
    "RN50x16": 290_979_217,
    "RN50x64": 623_258_305,
    "ViT-B/32": 151_277_313,
    "ViT-B/16": 149_620_737,
    "ViT-L/14": 427_616_513,
    "ViT-L/14@336px": 427_944_193,
    # Counted in open_clip 3.3.0.
    "ViT-H/14": 986_109_441,
    "ViT-g/14": 1_366_678_273,
    "SigLIP-B/16": 203_155_970,
    "SigLIP-So400m/14": 877_360_306,
    "SigLIP2-B/16": 375_187_970,
    "MetaCLIP2-H/14": 1_858_783_745,
    "CLIPA-L/14": 414_210_561,
    "CLIPA-H/14": 968_235_009,
    "PE-Core-B/16": 447_660_545 - 1024,  # without the bias of timm's projection
    "PE-Core-L/14@336px": 671_138_817 - 1024,
}
TINY_TEXT = {
    "text_width": 16,
    "text_heads": 2,
    "text_layers": 2,
    "context_length": 9,
    "vocab_size": 50,
    "embed_dim": 12,
}
TINY_VIT = TINY_TEXT | {
    "image_size": 12,
    "image_layers": (2,),
    "image_width": 24,
    "image_heads": 3,
    "patch_size": 4,
}
TINY_RESNET = TINY_TEXT | {
    "image_size": 64,
    "image_layers": (1, 2, 1, 1),
    "image_width": 4,
    "image_heads": 4,
}
EXACT = {"rtol": 1e-5, "atol": 1e-5}  # float32 against float64, of unit vectors


def make_batch(size: models.Size, batch: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images, and captions of lengths 3, 4, ... padded with zeros."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, size.image_size, size.image_size, 3), np.uint8)
    tokens = np.zeros((batch, size.context_length), np.int32)
    for i, row in enumerate(tokens):
        length = 3 + i % (size.context_length - 2)
        row[:length] = rng.integers(1, size.vocab_size - 2, length)
        row[0], row[length - 1] = size.vocab_size - 2, size.vocab_size - 1
    return images, tokens


def make_variables(net: models.CLIP) -> dict:
    """Variables in which nothing is 0 or 1 that starts so, as that would hide mistakes."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), *make_batch(net.size, 1))
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        if sharding.path_name(path).endswith(("scale", "var")):
            values = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            values = 0.2 * rng.normal(size=leaf.shape)
        return np.asarray(values, np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def apply(net: models.CLIP, variables: dict, *inputs, **options):
    return jax.jit(partial(net.apply, **options))(variables, *inputs)


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


# ---- Shapes and initialisation -----------------------------------------------------------------


@pytest.mark.parametrize("name", models.available_models())
def test_parameter_count(name: str):
    net = models.create(name)
    images = jnp.zeros((1, net.size.image_size, net.size.image_size, 3), jnp.uint8)
    tokens = jnp.zeros((1, net.size.context_length), jnp.int32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), images, tokens)
    params = jax.tree.leaves(shapes["params"])
    assert sum(math.prod(leaf.shape) for leaf in params) == PARAMETERS[name]
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    assert ("batch_stats" in shapes) == name.startswith("RN")


def test_all_models_are_counted():
    assert models.available_models() == list(PARAMETERS)


WIDTH, LAYERS = 128, 4  # wide enough for a deviation to be known to 2 %
INIT = {
    # path: (distribution, standard deviation); paper.md's table is from the published code
    "text/token_embed/embedding": ("normal", 0.02),
    "text/positions": ("normal", 0.01),
    "text/projection/kernel": ("normal", WIDTH**-0.5),
    "text/transformer/blocks/qkv/kernel": ("normal", WIDTH**-0.5),
    "text/transformer/blocks/attn_out/kernel": ("normal", WIDTH**-0.5 * (2 * LAYERS) ** -0.5),
    "text/transformer/blocks/mlp_in/kernel": ("normal", (2 * WIDTH) ** -0.5),
    "text/transformer/blocks/mlp_out/kernel": ("normal", WIDTH**-0.5 * (2 * LAYERS) ** -0.5),
    # What PyTorch gives a Linear: the published code touches no bias.
    "text/transformer/blocks/mlp_in/bias": ("uniform", (3 * WIDTH) ** -0.5),
    "text/transformer/blocks/mlp_out/bias": ("uniform", (3 * 4 * WIDTH) ** -0.5),
}
VIT_INIT = {
    "image/positions": ("normal", WIDTH**-0.5),
    "image/class_token": ("normal", WIDTH**-0.5),
    "image/projection/kernel": ("normal", WIDTH**-0.5),
    # What PyTorch gives these modules: the published code does not touch them.
    "image/patch_embed/kernel": ("uniform", (3 * 4 * 4 * 3) ** -0.5),
    "image/transformer/blocks/qkv/kernel": ("uniform", (2 / (WIDTH + 3 * WIDTH)) ** 0.5),
    "image/transformer/blocks/attn_out/kernel": ("uniform", (3 * WIDTH) ** -0.5),
    "image/transformer/blocks/mlp_in/kernel": ("uniform", (3 * WIDTH) ** -0.5),
    "image/transformer/blocks/mlp_out/kernel": ("uniform", (3 * 4 * WIDTH) ** -0.5),
    "image/transformer/blocks/mlp_in/bias": ("uniform", (3 * WIDTH) ** -0.5),
    "image/transformer/blocks/mlp_out/bias": ("uniform", (3 * 4 * WIDTH) ** -0.5),
}
RESNET_INIT = {
    "image/attention_pool/positions": ("normal", WIDTH**-0.5),
    "image/attention_pool/query/kernel": ("normal", WIDTH**-0.5),
    "image/attention_pool/key/kernel": ("normal", WIDTH**-0.5),
    "image/attention_pool/value/kernel": ("normal", WIDTH**-0.5),
    "image/attention_pool/projection/kernel": ("normal", WIDTH**-0.5),
    "image/attention_pool/query/bias": ("uniform", (3 * WIDTH) ** -0.5),
    "image/attention_pool/key/bias": ("uniform", (3 * WIDTH) ** -0.5),
    "image/attention_pool/value/bias": ("uniform", (3 * WIDTH) ** -0.5),
    "image/attention_pool/projection/bias": ("uniform", (3 * WIDTH) ** -0.5),
    "image/stem_conv1/kernel": ("uniform", (3 * 3 * 3 * 3) ** -0.5),
    "image/stage4_block0/conv2/kernel": ("uniform", (3 * 3 * 3 * 32) ** -0.5),
}


@pytest.mark.parametrize(("name", "table"), [("ViT-B/32", VIT_INIT), ("RN50", RESNET_INIT)])
def test_initialisation(name: str, table: dict):
    size = {"text_width": WIDTH, "text_layers": LAYERS, "context_length": 64, "vocab_size": 500}
    if name == "RN50":
        size |= {"image_size": 96, "image_layers": (1, 1, 1, 1), "image_width": 4}
        size |= {"image_heads": 2, "embed_dim": 64}
    else:
        size |= {"image_size": 32, "image_layers": (LAYERS,), "image_width": WIDTH}
        size |= {"image_heads": 2, "patch_size": 4}
    net = models.create(name, size=size)
    params = jax.jit(net.init)(jax.random.key(0), *make_batch(net.size, 1))["params"]
    flat = {sharding.path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    for path, (distribution, deviation) in (INIT | table).items():
        values = np.asarray(flat.pop(path), np.float64)
        assert values.std() == pytest.approx(deviation, rel=4 / math.sqrt(2 * values.size)), path
        assert abs(values.mean()) < 4 * deviation / math.sqrt(values.size), path
        # A uniform distribution ends at sqrt(3) deviations; a normal one does not.
        assert (np.abs(values).max() <= 1.7321 * deviation) == (distribution == "uniform"), path
        if "/blocks/" in path:
            assert not np.array_equal(values[0], values[1]), f"{path}: equal layers"
    assert float(flat.pop("logit_scale")) == pytest.approx(math.log(1 / 0.07))
    for path, leaf in flat.items():
        if not path.endswith("kernel"):
            is_one = path.endswith("scale") and "bn3" not in path.replace("stem_bn3", "")
            assert np.all(np.asarray(leaf) == float(is_one)), path


# ---- Against NumPy in float64 ------------------------------------------------------------------


def test_vit_and_text_equal_numpy():
    net = models.create("ViT-B/32", size=TINY_VIT)
    variables, (images, tokens) = make_variables(net), make_batch(net.size)
    image, text, logit_scale = apply(net, variables, images, tokens)
    p = float64(variables["params"])
    np.testing.assert_allclose(image, numpy_models.vit(images, p["image"], 4), **EXACT)
    np.testing.assert_allclose(text, numpy_models.text(tokens, p["text"]), **EXACT)
    assert logit_scale == variables["params"]["logit_scale"]
    for method, inputs, expected in (
        ("encode_image", images, image),
        ("encode_text", tokens, text),
    ):
        alone = apply(net, variables, inputs, method=method)
        np.testing.assert_allclose(alone, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("train", [False, True])
def test_resnet_equals_numpy(train: bool):
    net = models.create("RN50", size=TINY_RESNET)
    variables, (images, tokens) = make_variables(net), make_batch(net.size)
    (image, _, _), updated = apply(
        net, variables, images, tokens, train=train, mutable=["batch_stats"]
    )
    p, stats = float64(variables["params"])["image"], float64(variables["batch_stats"])["image"]
    np.testing.assert_allclose(
        image, numpy_models.resnet(images, p, None if train else stats), **EXACT
    )

    first = numpy_models.conv(numpy_models.pixels(images), p["stem_conv1"], stride=2)
    ours = updated["batch_stats"]["image"]["stem_bn1"]
    for key, batch_value in (("mean", first.mean((0, 1, 2))), ("var", first.var((0, 1, 2)))):
        old = stats["stem_bn1"][key]
        expected = 0.9 * old + 0.1 * batch_value if train else old
        np.testing.assert_allclose(ours[key], expected, **EXACT)


# ---- Text --------------------------------------------------------------------------------------


def test_text_is_causal_and_read_at_the_end_token():
    net = models.create("ViT-B/32", size=TINY_VIT)
    variables, (_, tokens) = make_variables(net), make_batch(net.size)
    encode = partial(jax.jit(partial(net.apply, method="encode_text")), variables)
    before = encode(tokens)
    end = tokens.argmax(axis=1)
    for position in range(tokens.shape[1]):
        changed = tokens.copy()
        changed[:, position] = np.where(tokens[:, position] == 7, 8, 7)
        difference = np.abs(encode(changed) - before).max(axis=1)
        assert np.all(difference[end < position] == 0), position
        assert np.all(difference[end > position] > 1e-4), position
    longest = end.max() + 1
    cut = encode(tokens[:, :longest])
    np.testing.assert_allclose(cut, before, rtol=1e-5, atol=1e-6)


# ---- Scan, unrolling, rematerialisation --------------------------------------------------------


def value_and_grads(net: models.CLIP, variables: dict, images, tokens):
    def loss_fn(params):
        embeds, updated = net.apply(
            variables | {"params": params}, images, tokens, train=True, mutable=["batch_stats"]
        )
        return losses.softmax_loss(*embeds), (embeds, updated)

    (loss, (embeds, updated)), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
        variables["params"]
    )
    return {"loss": loss, "embeds": embeds, "updated": updated, "grads": grads}


def assert_trees_close(actual, expected, tolerance: float):
    """Each leaf's largest difference, relative to the leaf's largest entry."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for path, want in jax.tree.leaves_with_path(expected):
        got = dict(jax.tree.leaves_with_path(actual))[path]
        scale = max(float(jnp.abs(want).max()), 1e-6)
        assert float(jnp.abs(got - want).max()) <= tolerance * scale, sharding.path_name(path)


@pytest.fixture(scope="module")
def scanned():
    """The plain scanned model, its variables and batch, and what it computes."""
    net = models.create("ViT-B/32", size=TINY_VIT)
    variables, batch = make_variables(net), make_batch(net.size)
    return variables, batch, value_and_grads(net, variables, *batch)


@pytest.mark.parametrize(
    ("scan", "remat"),
    [(False, "none"), (False, "full"), (True, "full"), (True, "dots_with_no_batch_dims_saveable")],
)
@pytest.mark.slow
def test_same_result_unrolled_and_rematerialised(scanned, scan: bool, remat: str):
    variables, batch, expected = scanned
    net = models.create("ViT-B/32", scan_layers=scan, remat=remat, size=TINY_VIT)
    assert_trees_close(value_and_grads(net, variables, *batch), expected, 2e-5)


def saved_floats(remat: str) -> int:
    """Number of floats that the forward pass of a scanned transformer keeps for the backward."""
    net = transformer.Transformer(
        layers=3, heads=2, mlp=64, activation="quick_gelu", norm_eps=1e-5, dtype=jnp.float32,
        scan_layers=True, remat=remat, attention="xla", causal=False, paper_init=False,
    )  # fmt: skip
    x = jnp.ones((2, 8, 16))
    params = jax.eval_shape(net.init, jax.random.key(0), x)
    _, backward = jax.eval_shape(lambda params, x: jax.vjp(net.apply, params, x), params, x)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(backward))


def test_remat_saves_less():
    none, dots, plain_dots, full = map(
        saved_floats, ("none", "dots_saveable", "dots_with_no_batch_dims_saveable", "full")
    )
    assert full == saved_floats("nothing_saveable") < plain_dots < dots < none
    kept = [saved_floats(name) - full for name in layers.NAMED]
    one = 3 * 2 * 8 * 16  # floats of an activation of all layers
    # Less the biases, which are not needed to compute again what is kept.
    assert kept == pytest.approx([one * count for count in (1, 4, 5, 9)], rel=0.06)
    assert full + kept[-1] < none
    # Without remat QuickGELU still recomputes its sigmoid and product.
    assert none < saved_floats("everything_saveable")


# ---- Precision and input -----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [("ViT-B/32", TINY_VIT), ("RN50", TINY_RESNET)])
def test_bfloat16_compute(name: str, size: dict):
    net, half = (models.create(name, dtype=t, size=size) for t in (jnp.float32, jnp.bfloat16))
    variables, batch = make_variables(net), make_batch(net.size)
    exact, rounded = apply(net, variables, *batch), apply(half, variables, *batch)
    for ours, expected in zip(rounded[:2], exact[:2]):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, rtol=1e-6)
        error = np.linalg.norm(ours - expected, axis=1).max()
        assert 1e-4 < error < 0.05  # 0: not computed in bfloat16, which has 3 digits
    assert rounded[2] == exact[2]


def test_uint8_and_normalised_floats_are_equal():
    net = models.create("ViT-B/32", size=TINY_VIT)
    variables, (images, _) = make_variables(net), make_batch(net.size)
    floats = numpy_models.pixels(images.astype(np.float64)).astype(np.float32)
    from_uint8, from_floats = (
        apply(net, variables, x, method="encode_image") for x in (images, floats)
    )
    np.testing.assert_allclose(from_uint8, from_floats, **EXACT)


def test_zero_vector_normalises_to_zero():
    value, gradient = jax.value_and_grad(lambda x: clip.l2_normalize(x).sum())(jnp.zeros(4))
    assert value == 0
    assert np.all(np.isfinite(gradient))


# ---- Devices -----------------------------------------------------------------------------------


def sharded(mesh8, variables: dict, batch: tuple) -> tuple[dict, tuple]:
    """Parameters placed by the table of rules, the batch over all devices."""
    variables = jax.device_put(variables, sharding.tree_shardings(variables, mesh8))
    return variables, jax.device_put(batch, sharding.batch_sharding(mesh8))


@pytest.mark.slow
def test_vit_sharded_equals_one_device(mesh8):
    net = models.create("ViT-B/32", size=TINY_VIT)
    variables, batch = make_variables(net), make_batch(net.size, 16)
    expected = value_and_grads(net, variables, *batch)
    with jax.set_mesh(mesh8):
        on_mesh, batch = sharded(mesh8, variables, batch)
        kernel = on_mesh["params"]["image"]["transformer"]["blocks"]["qkv"]["kernel"]
        assert not kernel.is_fully_replicated
        actual = value_and_grads(net, on_mesh, *batch)
    assert_trees_close(jax.device_get(actual), jax.device_get(expected), 2e-5)


def test_batch_norm_spans_the_devices(mesh8):
    net = models.create("RN50", size=TINY_RESNET)
    images, tokens = make_batch(net.size, 16)
    images[:8] //= 4  # so that one device's batch is unlike another's
    variables, options = make_variables(net), {"train": True, "mutable": ["batch_stats"]}
    expected = apply(net, variables, images, tokens, **options)
    with jax.set_mesh(mesh8):
        on_mesh, batch = sharded(mesh8, variables, (images, tokens))
        actual = apply(net, on_mesh, *batch, **options)
    assert_trees_close(jax.device_get(actual), jax.device_get(expected), 2e-5)


# ---- Errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("ViT-B/23", None, r"Unknown model 'ViT-B/23'.*RN50x16.*ViT-B/32"),
        ("ViT-B/32", {"depth": 3}, r"no depth.*image_layers"),
        ("ViT-B/32", {"image_size": 31}, r"image_size \(31\).*patch_size.*\(32\)"),
        ("ViT-B/32", {"text_heads": 7}, r"text_width \(512\).*text_heads \(7\)"),
        ("ViT-B/32", {"image_layers": (1, 2)}, r"\(1, 2\).*\(12,\)"),
        ("RN50", {"image_layers": (12,)}, r"4 stages.*\(12,\)"),
        ("RN50", {"image_size": 100}, r"image_size \(100\)"),
    ],
)
def test_impossible_models(name: str, size: dict | None, message: str):
    with pytest.raises(UserError, match=message):
        models.create(name, size=size)


def test_unknown_remat():
    net = models.create("ViT-B/32", remat="some", size=TINY_VIT)
    with pytest.raises(UserError, match=r"'some'.*dots_saveable"):
        jax.eval_shape(net.init, jax.random.key(0), *make_batch(net.size, 1))


def test_none_overrides_nothing():
    assert models.get_size("RN50", {"image_width": None}) == models.get_size("RN50")


def test_is_pure_flax():
    assert isinstance(models.create("RN50"), nn.Module)
