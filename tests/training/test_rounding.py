"""Random rounding to bfloat16, and what is stored in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from clip_jax import optim
from clip_jax.errors import UserError
from clip_jax.optim import round_tree, stochastic_round


def neighbours(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bfloat16 numbers around float32 ones, as float32: towards zero, and away from it."""
    down = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    up = ((down.view(np.uint32) + 0x10000) & 0xFFFFFFFF).view(np.float32)
    return down, up


def test_rounds_to_a_neighbour_with_the_right_probability():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=64) * 10.0 ** rng.integers(-30, 30, 64)).astype(np.float32)
    draws = 4096
    rounded = stochastic_round(jnp.broadcast_to(x, (draws, 64)), jax.random.key(0))
    assert rounded.dtype == jnp.bfloat16
    rounded, (down, up) = np.asarray(rounded, np.float64), neighbours(x)
    assert np.all((rounded == down) | (rounded == up))
    probability = (x - down.astype(np.float64)) / (up.astype(np.float64) - down)
    deviation = np.sqrt(probability * (1 - probability) / draws)
    assert np.all(np.abs((rounded == up).mean(axis=0) - probability) < 5 * deviation + 1e-12)


def test_what_bfloat16_can_hold_stays():
    x = jnp.array([0, -0.0, 1, -3.5, 2.0**-126, 3.3895314e38, np.inf, -np.inf], jnp.float32)
    for seed in range(5):
        got = np.asarray(stochastic_round(x, jax.random.key(seed)), np.float32)
        np.testing.assert_array_equal(got, np.asarray(x))
    assert np.isnan(np.asarray(stochastic_round(jnp.array([np.nan]), jax.random.key(0)))).all()


def test_small_updates_add_up():
    """1,000 steps of 1/2,000: to nearest, 1.0 would never move."""
    step = jax.jit(lambda x, key: stochastic_round(x.astype(jnp.float32) + 1 / 2000, key))
    x = jnp.ones(512, jnp.bfloat16)
    assert jnp.all((x.astype(jnp.float32) + 1 / 2000).astype(jnp.bfloat16) == 1)
    for key in jax.random.split(jax.random.key(0), 1000):
        x = step(x, key)
    assert np.asarray(x, np.float64).mean() == pytest.approx(1.5, abs=0.01)


def test_leaves_get_noise_of_their_own():
    x = jnp.full(1000, 1 + 1 / 512, jnp.float32)
    like = {"a": x.astype(jnp.bfloat16), "b": x.astype(jnp.bfloat16), "c": x}
    got = round_tree({"a": x, "b": x, "c": x}, like, jax.random.key(0))
    assert got["a"].dtype == jnp.bfloat16
    assert 0.3 < float(jnp.mean(got["a"] == got["b"])) < 0.7
    assert got["c"] is x


def adam(moment_dtype: str):
    settings = tiny.optim_settings(
        b2=0.999, eps=1e-8, weight_decay=0.0, decay_params="", moment_dtype=moment_dtype
    )
    return optim.make_optimizer(lambda _: 0.01, settings, seed=0).rule


def test_moments_in_16_bits_follow_those_in_32():
    """The second moment moves by a thousandth of itself a step: to nearest it would stop."""
    params = {"kernel": jnp.zeros((64, 64))}
    updates, states = {}, {}
    for dtype in ("float32", "bfloat16"):
        tx = adam(dtype)
        state = tx.init(params)
        update = jax.jit(tx.update)
        draws = np.random.default_rng(0)
        for step in range(400):
            size = 1.0 if step < 200 else 0.1  # so that the moments must come down again
            grads = {"kernel": jnp.asarray(size * draws.normal(1, 1, (64, 64)), jnp.float32)}
            updates[dtype], state = update(grads, state, params)
        states[dtype] = state[1]
    for moment in ("mu", "nu"):
        got, want = (getattr(states[d], moment)["kernel"] for d in ("bfloat16", "float32"))
        assert got.dtype == jnp.bfloat16
        assert float(got.astype(jnp.float32).mean()) == pytest.approx(float(want.mean()), rel=0.01)
    got, want = updates["bfloat16"]["kernel"], updates["float32"]["kernel"]
    assert float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < 0.05


def test_parameters_that_a_pattern_finds_are_bfloat16():
    params = {"text": {"kernel": jnp.ones(3)}, "image": {"kernel": jnp.ones(3)}}
    converted = optim.to_bf16(params, "^text/")
    assert converted["text"]["kernel"].dtype == jnp.bfloat16
    assert converted["image"]["kernel"].dtype == jnp.float32
    assert optim.to_bf16(params, "") is params


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("^txt/", r"finds no parameter.*image, text"), ("(", "no regular expression")],
)
def test_patterns_that_cannot_be_meant(pattern: str, message: str):
    with pytest.raises(UserError, match=message):
        optim.to_bf16({"text": jnp.ones(3), "image": jnp.ones(3)}, pattern)


def test_updates_of_bf16_params_take_stochastic_rounding():
    params = {"a": jnp.ones(4096, jnp.bfloat16), "b": jnp.ones(4096)}
    updates = {"a": jnp.full(4096, 1 / 2000), "b": jnp.full(4096, 1 / 2000)}
    got = optim.apply_updates(params, updates, jax.random.key(0))
    assert got["a"].dtype == jnp.bfloat16
    assert float(got["a"].astype(jnp.float32).mean()) == pytest.approx(1 + 1 / 2000, abs=2e-4)
    np.testing.assert_array_equal(got["b"], np.float32(1) + np.float32(1 / 2000))
