"""LayerNorm and its kernel for TPUs, in interpret mode, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.experimental import pallas as pl

from clip_jax import sharding
from clip_jax.models import layer_norm
from clip_jax.models.layer_norm import LayerNorm

EPS = 1e-5


@pytest.fixture
def calls(monkeypatch):
    """Interprets kernels; a list that gets the name of each that is called."""
    names = []

    def call(*args, name, **options):
        names.append(name)
        return pl.pallas_call.original(*args, name=name, **options, interpret=True)

    call.original = pl.pallas_call
    monkeypatch.setattr(layer_norm.pl, "pallas_call", call)
    return names


def reference(x, scale, bias, gradient, past):
    """Returns the result, the gradients of all inputs and constants, and x, float64."""
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + EPS)
    z = centred / deviation
    of_z = gradient * scale
    of_x = past + (
        of_z - of_z.mean(-1, keepdims=True) - z * (of_z * z).mean(-1, keepdims=True)
    ) / deviation  # fmt: skip
    sums = (each.reshape(-1, x.shape[-1]).sum(0) for each in (gradient * z, gradient, of_x, past))
    return (z * scale + bias, of_x, *sums, x)


def inputs(shape, dtype):
    rng = np.random.default_rng(shape[-2])
    arrays = [jnp.asarray(3 + 2 * rng.normal(size=shape), dtype) for _ in range(3)]
    rows = [jnp.asarray(1 + rng.normal(size=shape[-1:]), jnp.float32) for _ in range(2)]
    return *arrays, *rows


def results(x, gradient, past, scale, bias, constants=True, kernel=True):
    """Returns what `reference` returns; without constants, without their gradients."""
    net = LayerNorm(EPS, x.dtype, kernel)

    def function(x, scale, bias, *constants):
        params = {"params": {"scale": scale, "bias": bias}}
        return net.apply(params, x, constants or None)

    zeros = [jnp.zeros_like(scale)] * 2 * constants
    (y, x_past), backward = jax.vjp(function, x, scale, bias, *zeros)
    return y, *backward((gradient, past)), x_past


def assert_close(found, expected, dtype):
    tolerance = {"float32": 2e-6, "bfloat16": 8e-3}[dtype]  # of the largest value
    for mine, other in zip(found, expected, strict=True):
        error = np.abs(np.asarray(mine, "f8") - other).max()
        assert error <= tolerance * np.abs(other).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape",
    [(4, 32, 128), (3, 50, 256), (2, 197, 384), (6, 16, 1408), (1, 729, 1152), (5, 77, 512)],
)
def test_kernel_equals_float64(shape, dtype, calls, monkeypatch):
    monkeypatch.setattr(layer_norm, "_BLOCK", 2 * shape[1] * shape[2])  # two examples, where even
    x, gradient, past, scale, bias = inputs(shape, dtype)
    found = results(x, gradient, past, scale, bias)
    assert calls == ["layer_norm_forward", "layer_norm_backward"]
    float64 = [np.asarray(each, "f8") for each in (x, scale, bias, gradient, past)]
    expected = reference(*float64)
    assert_close(found, expected, dtype)
    without = results(x, gradient, past, scale, bias, constants=False)
    assert_close(without, [*expected[:4], expected[-1]], dtype)


@pytest.mark.parametrize("shape", [(4, 8, 128), (4, 32, 100), (4, 128)])
def test_what_does_not_fit_the_kernel_gives_the_same(shape, calls):
    x, gradient, past, scale, bias = inputs(shape, "float32")
    found = results(x, gradient, past, scale, bias)
    float64 = [np.asarray(each, "f8") for each in (x, scale, bias, gradient, past)]
    assert_close(found, reference(*float64), "float32")
    assert not calls


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_form_is_flax_s(dtype):
    x, *_ = inputs((4, 7, 64), dtype)
    theirs = nn.LayerNorm(epsilon=EPS, dtype=dtype, use_fast_variance=False)
    mine = LayerNorm(EPS, dtype, False)
    params = mine.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        jnp.shape, theirs.init(jax.random.key(0), x)
    )
    params = jax.tree.map(lambda p: p + jnp.linspace(0.1, 2.0, 64), params)
    y, same = mine.apply(params, x)
    np.testing.assert_array_equal(y, theirs.apply(params, x))
    assert same is x


def test_a_token_apart_shares_the_parameters(calls):
    x, gradient, past, scale, bias = inputs((4, 17, 128), "float32")
    net = LayerNorm(EPS, x.dtype, True)

    def apart(x, scale, bias, *constants):
        params = {"params": {"scale": scale, "bias": bias}}
        pairs = net.apply(params, (x[:, 1:], x[:, 0]), constants)
        return [jnp.concatenate([token[:, None], rest], 1) for rest, token in pairs]

    y, backward = jax.vjp(apart, x, scale, bias, jnp.zeros(128), jnp.zeros(128))
    assert calls
    float64 = [np.asarray(each, "f8") for each in (x, scale, bias, gradient, past)]
    assert_close((y[0], *backward([gradient, past]), y[1]), reference(*float64), "float32")


def test_a_mesh_changes_nothing(calls):
    arguments = inputs((8, 32, 128), "float32")
    expected = jax.jit(results)(*arguments)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        place = sharding.batch_sharding(mesh)
        placed = [jax.device_put(each, place) for each in arguments[:3]]
        found = jax.jit(results)(*placed, *arguments[3:])
    for mine, other in zip(found, expected):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-4)
