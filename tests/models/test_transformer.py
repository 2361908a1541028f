"""A transformer of which some tokens are read, against one of which all are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models import packing, transformer

LAYERS, WIDTH, TOKENS = 2, 64, 9
END = jnp.array([[4], [8], [2]])


def make(causal: bool, scan_layers: bool, remat: str = "none") -> transformer.Transformer:
    return transformer.Transformer(
        layers=LAYERS,
        heads=2,
        mlp=4 * WIDTH,
        activation="quick_gelu",
        norm_eps=1e-5,
        dtype=jnp.float32,
        scan_layers=scan_layers,
        remat=remat,
        attention="xla",
        causal=causal,
        paper_init=True,
    )


def first(x):
    return x[:, :1]


def apart(x):
    return x[1][:, None]


def at_the_end(x):
    return packing.pick(x, END)


def everywhere(x):
    return x


WHOLE = jnp.asarray(np.random.default_rng(0).normal(size=(3, TOKENS, WIDTH)), jnp.float32)
TOKEN_APART = (WHOLE[:, 1:], WHOLE[:, 0])
SOME = jnp.asarray(np.random.default_rng(1).random((3, 1, TOKENS, TOKENS)) < 0.7)


@pytest.mark.parametrize(
    ("x", "causal", "mask", "read"),
    [
        pytest.param(WHOLE, False, None, first, id="class token"),
        pytest.param(TOKEN_APART, False, None, apart, id="class token apart"),
        pytest.param(WHOLE, True, None, at_the_end, id="end token"),
        pytest.param(WHOLE, True, SOME | jnp.eye(TOKENS, dtype=bool), at_the_end, id="masked"),
    ],
)
@pytest.mark.parametrize(
    ("scan_layers", "remat"), [(True, "none"), pytest.param(False, "full", marks=pytest.mark.slow)]
)
def test_values_and_gradients_are_those_of_all(x, causal, mask, read, scan_layers, remat):
    """The others are computed and thrown away; their gradient is that of the tokens before."""
    net = make(causal, scan_layers, remat)
    params = make(causal, True).init(jax.random.key(0), x)
    # Biases that are not zero, as zeros would hide that one is left out.
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.shape[-1])), params)

    def loss(params, x, early):
        y = net.apply(params, x, mask, read) if early else read(net.apply(params, x, mask))
        return jnp.sum(y * jnp.sin(jnp.arange(WIDTH))), y

    (_, some), gradient = run(loss, params, x, True)
    (_, whole), expected = run(loss, params, x, False)
    assert some.shape == (3, 1, WIDTH)
    np.testing.assert_allclose(some, whole, rtol=1e-5, atol=1e-5)
    for leaf, expected_leaf in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected)):
        scale = np.abs(expected_leaf).max()
        np.testing.assert_allclose(leaf, expected_leaf, rtol=1e-4, atol=1e-5 * scale)


def run(loss, params, x, early: bool):
    return jax.jit(
        jax.value_and_grad(lambda params, x: loss(params, x, early), argnums=(0, 1), has_aux=True)
    )(params, x)


@pytest.mark.parametrize(
    ("x", "causal", "read", "left_out"),
    [  # in widths squared per token: attention's output and the MLP; where all see all, queries too
        pytest.param(WHOLE, False, first, 10, id="class token"),
        pytest.param(TOKEN_APART, False, apart, 10, id="class token apart"),
        pytest.param(WHOLE, True, at_the_end, 9, id="end token"),
    ],
)
def test_what_is_not_read_is_not_computed(x, causal, read, left_out):
    net = make(causal, scan_layers=False)
    params = net.init(jax.random.key(0), x)

    def flops(read):
        compiled = jax.jit(lambda params, x: net.apply(params, x, read=read)).lower(params, x)
        return compiled.compile().cost_analysis()["flops"]

    products = 2 * left_out * (TOKENS - 1) * WIDTH**2 * len(WHOLE)
    assert flops(everywhere) - flops(read) > products
