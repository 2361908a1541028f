"""The attention kernel for TPUs, in interpret mode, against NumPy in float64 and XLA's form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from clip_jax import models, sharding
from clip_jax.errors import UserError
from clip_jax.models import attention, attention_kernel, packing
from clip_jax.training import program


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    interpreted = functools.partial(pl.pallas_call, interpret=True)
    monkeypatch.setattr(attention_kernel.pl, "pallas_call", interpreted)
    monkeypatch.setattr(attention_kernel, "SHORTEST", 1)


def reference(q, k, v, g, mask):
    """Returns attention and its gradients, [b, h, d, s] float64, by the formulas of softmax."""
    scale = q.shape[2] ** -0.5
    logits = np.einsum("bhdq,bhdk->bhqk", q, k) * scale
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True)) * (1 if mask is None else mask)
    weights /= weights.sum(axis=-1, keepdims=True)
    of_weights = np.einsum("bhdq,bhdk->bhqk", g, v)
    mean = (of_weights * weights).sum(axis=-1, keepdims=True)
    of_logits = weights * (of_weights - mean) * scale
    return (
        np.einsum("bhqk,bhdk->bhdq", weights, v),
        np.einsum("bhqk,bhdk->bhdq", of_logits, k),
        np.einsum("bhqk,bhdq->bhdk", of_logits, q),
        np.einsum("bhqk,bhdq->bhdk", weights, g),
    )


def captions(batch: int, length: int) -> jax.Array:
    """Masks packed captions of various lengths."""
    rng = np.random.default_rng(1)
    numbers = np.sort(rng.integers(0, 4, (batch, length)), axis=1)
    return packing.attention_mask(jnp.asarray(numbers))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("heads", "d", "length", "token", "masked"),
    [
        (3, 64, 50, False, False),
        (2, 64, 197, False, False),
        (8, 64, 256, True, False),  # a class token apart, and groups of eight heads
        (16, 80, 24, True, False),
        (2, 88, 128, True, False),
        (2, 72, 196, False, False),
        (1, 104, 577, False, False),
        (2, 64, 80, False, True),
    ],
)
def test_kernel_equals_float64(heads, d, length, token, masked, dtype):
    rng = np.random.default_rng(length)
    tokens = length + token
    parts = jnp.asarray(rng.normal(size=(2, 3, heads, d, tokens)), dtype)
    gradient = jnp.asarray(rng.normal(size=(2, heads, d, tokens)), dtype)
    mask = captions(2, length) if masked else None

    def attend(parts, bias):
        own = parts[..., length] if token else None
        projected = attention_kernel.Projected(parts[..., :length], own)
        y = attention_kernel.attend(projected, bias, mask)
        return jnp.concatenate([y.sequence, y.token[..., None]], -1) if token else y.sequence

    assert_equals_float64(attend, parts, gradient, mask, length)


def assert_equals_float64(attend, parts, gradient, mask, length):
    """Compares attend(parts, bias), whose bias is of the first tokens, and its gradients."""
    dtype = str(parts.dtype)
    y, backward = jax.vjp(attend, parts, jnp.zeros((3, *parts.shape[2:4]), dtype))
    found, of_bias = backward(gradient)
    parts, gradient = np.asarray(parts, "f8"), np.asarray(gradient, "f8")
    expected = reference(*parts.swapaxes(0, 1), gradient, mask)
    # Of the largest value. In bfloat16 the weights and the results are rounded, to 8 bits.
    tolerance = {"float32": 2e-6, "bfloat16": 1.5e-2}[dtype]
    sums = np.stack(expected[1:])[..., :length].sum(axis=(1, 4))
    found = (y, *np.asarray(found, "f8").swapaxes(0, 1), of_bias)
    for mine, other in zip(found, (*expected, sums)):
        error = np.abs(np.asarray(mine, "f8") - other).max()
        assert error <= tolerance * np.abs(other).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_is_not_seen(dtype):
    rng = np.random.default_rng(0)
    parts = jnp.asarray(rng.normal(size=(2, 3, 2, 64, 197)), dtype)
    gradient = jnp.asarray(rng.normal(size=(2, 2, 64, 197)), dtype)

    def attend(parts, bias):
        padded = jnp.pad(parts, (*[(0, 0)] * 4, (0, 3)), constant_values=1e4)
        y = attention_kernel.attend(attention_kernel.Projected(padded, None), bias, length=197)
        return y.sequence[..., :197] + y.sequence[..., 197:].sum()  # which are zeros

    assert_equals_float64(attend, parts, gradient, None, 197)


def test_a_key_that_wins_by_far_stays_finite():
    parts = np.zeros((1, 3, 1, 8, 8), np.float32)
    parts[:, :2] = 100.0
    token, bias = np.full((1, 3, 1, 8), 300.0, np.float32), jnp.zeros((3, 1, 8))

    def loss(sequence, token):
        y = attention_kernel.attend(attention_kernel.Projected(sequence, token), bias)
        return jnp.sum(y.sequence) + jnp.sum(y.token)

    value, gradients = jax.value_and_grad(loss, (0, 1))(parts, token)
    assert value == 300.0 * 8 * 9  # the token's value everywhere
    assert all(np.isfinite(leaf).all() for leaf in gradients)


SIZE = {
    "image_size": 64, "patch_size": 8, "image_layers": (2,), "image_width": 128, "image_heads": 2,
    "text_width": 128, "text_heads": 2, "text_layers": 2, "embed_dim": 16, "context_length": 16,
    "vocab_size": 64,
}  # fmt: skip


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def make(form: str, remat: str = "none", scan_layers: bool = True, **size):
    pack = {"length": 24, "rows": 0.5} if "text_pool" not in size else None
    return models.create(
        "ViT-B/32", scan_layers=scan_layers, remat=remat, attention=form, packing=pack,
        size=SIZE | size,
    )  # fmt: skip


def batch(count: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(count, 64, 64, 3)).astype(np.float32)
    tokens = np.zeros((count, 16), np.int32)
    for row in tokens:
        length = rng.integers(2, 17)
        row[:length] = rng.integers(1, 62, length)
        row[length - 1] = 63
    return jnp.asarray(images), jnp.asarray(tokens)


def gradients(net, params, images, tokens):
    """Returns all gradients of a sum over both towers' embeddings, packed captions."""

    def loss(params):
        image, text, _ = net.apply({"params": params}, images, tokens, train=True)
        return jnp.sum(image * jnp.cos(jnp.arange(16))) + jnp.sum(text[:, ::-1] * image)

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize(
    ("shortest", "scan_layers", "remat", "size"),
    [
        (1, True, "attention", {}),  # the class token apart, as with the 256 patches of ViT-L/14
        slow(1, False, "full", {"image_size": 56}),  # 50 tokens, padded to 56
        slow(1, True, "none", {"image_pool": "map", "image_size": 56}),  # 49 patches, padded to 56
        slow(1, True, "attention", {"image_pool": "avg", "image_registers": 1}),  # apart, not read
        slow(1, True, "none", {"image_pool": "map", "image_registers": 1, "image_rope": True}),
        slow(1, False, "attention", {"image_layer_scale": 0.5, "image_size": 56}),
        slow(1, True, "none", {"image_qk_norm": True}),
        slow(1, True, "residual", {"activation": "swiglu", "norm": "rms"}),
        (65, False, "residual", {"image_size": 56}),  # four times 50 tokens as one sequence
        slow(65, True, "none", {"image_pool": "map", "image_size": 48}),  # twice 36 patches
    ],
)
def test_a_model_learns_the_same(monkeypatch, shortest, scan_layers, remat, size):
    monkeypatch.setattr("clip_jax.models.vit.FULL_TILES", 64)
    monkeypatch.setattr(attention_kernel, "SHORTEST", shortest)
    images, tokens = batch(4)
    images = images[:, : size.get("image_size", 64), : size.get("image_size", 64)]
    plain = make("xla", **size)
    params = plain.init(jax.random.key(0), images, tokens)["params"]
    value, expected = gradients(plain, params, images, tokens)
    kernel = make("pallas", remat, scan_layers, **size)
    assert "attention_backward" in str(
        jax.make_jaxpr(lambda p: gradients(kernel, p, images, tokens))(params)
    )
    mine, found = gradients(kernel, params, images, tokens)
    np.testing.assert_allclose(mine, value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * float(jnp.abs(b).max() + 1e-3))


@pytest.mark.parametrize(
    "size", [{}, slow({"activation": "swiglu", "norm": "rms", "text_pool": "map"})]
)
def test_a_mesh_changes_nothing(size):
    images, tokens = batch(8)
    net = make("pallas", "residual", **size)
    params = net.init(jax.random.key(0), images, tokens)["params"]
    _, expected = gradients(net, params, images, tokens)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.tree_shardings(params, mesh))
        placed = jax.device_put((images, tokens), sharding.batch_sharding(mesh))
        _, found = gradients(net, params, *placed)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * float(jnp.abs(b).max() + 1e-3))


def test_shapes_that_do_not_fit_are_named_and_take_the_plain_form(monkeypatch):
    size = models.get_size("ViT-B/32", {"image_heads": 64, "text_width": 600, "text_heads": 3})
    assert attention.misfits(size, 77, 128) == {
        "image": "heads 12 wide are not a multiple of 8 up to 128",
        "text": "heads 200 wide are not a multiple of 8 up to 128",
    }
    assert not attention.misfits(models.get_size("ViT-L/14@336px"), 80, 128)
    assert attention.misfits(models.get_size("PE-Core-B/16"), 80, 128) == {
        "image": "its queries and keys are rotated (image_rope)"
    }
    monkeypatch.undo()
    assert not attention.misfits(models.get_size("ViT-B/32"), 80, 128)
    assert attention.misfits(models.get_size("ViT-B/32"), 64, 126) == {
        "image": "50 tokens would fill half of the chip's lanes, or less",
        "text": "64 tokens would fill half of the chip's lanes, or less",
    }
    net = make("pallas", image_width=64, image_heads=16, text_width=32, text_heads=8)
    images, tokens = batch(2)
    params = net.init(jax.random.key(0), images, tokens)["params"]
    plain = dataclasses.replace(net, attention="xla")
    expected, found = (gradients(each, params, images, tokens)[0] for each in (plain, net))
    assert expected == found


def test_auto_takes_the_kernel_on_a_tpu():
    choose = program.choose_attention
    assert choose("auto", "tpu", "TPU v5 lite", "bfloat16") == "pallas"
    assert choose("auto", "tpu", "TPU v4", "bfloat16") == "xla"
    assert choose("auto", "tpu", "TPU v5 lite", "float32") == "xla"
    assert choose("auto", "cpu", "cpu", "float32") == "xla"
    assert choose("cudnn", "gpu", "NVIDIA H200", "bfloat16") == "cudnn"
    for asked, platform, dtype in (("pallas", "cpu", "bfloat16"), ("cudnn", "gpu", "float32")):
        with pytest.raises(UserError, match=f"attention={asked} .*{platform}"):
            choose(asked, platform, "any", dtype)
