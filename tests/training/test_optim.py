"""The optimiser against NumPy float64, and what it leaves undecayed."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from clip_jax import models, optim, sharding
from clip_jax.configs import siglip_b16
from clip_jax.errors import UserError
from clip_jax.training import program

SETTINGS = {"b1": 0.9, "b2": 0.98, "eps": 1e-6, "weight_decay": 0.2, "grad_clip_norm": 0.0}
SHAPES = {
    "text": {"mlp_in": {"kernel": (3, 4), "bias": (4,)}, "ln_final": {"scale": (4,), "bias": (4,)}},
    "logit_scale": (),
}
IS_SHAPE = {"is_leaf": lambda node: isinstance(node, tuple)}


def random_tree(seed: int, size: float = 1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: (size * rng.normal(size=shape)).astype(np.float32), SHAPES, **IS_SHAPE
    )


def named_leaves(tree) -> dict[str, np.ndarray]:
    return {sharding.path_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}


def adamw(params, gradients, learning_rates, *, b1, b2, eps, weight_decay, grad_clip_norm):
    """AdamW by its definition, float64, on {name: array}; only kernels decay here."""
    params = {name: value.astype(np.float64) for name, value in params.items()}
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    for t, (grads, rate) in enumerate(zip(gradients, learning_rates), start=1):
        norm = math.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values()))
        shrink = min(1, grad_clip_norm / norm) if grad_clip_norm else 1
        for name in params:
            grad = grads[name] * shrink
            first[name] = b1 * first[name] + (1 - b1) * grad
            second[name] = b2 * second[name] + (1 - b2) * grad**2
            unbiased = first[name] / (1 - b1**t), second[name] / (1 - b2**t)
            update = unbiased[0] / (np.sqrt(unbiased[1]) + eps)
            if name.endswith("kernel"):
                update = update + weight_decay * params[name]
            params[name] = params[name] - rate * update
    return params


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"b2": 0.999, "eps": 1e-8},
        {"grad_clip_norm": 0.5},  # bites at every step
        {"grad_clip_norm": 3.0},  # at some
        {"weight_decay": 0.0},
    ],
    ids=str,
)
def test_updates(overrides: dict):
    settings = SETTINGS | overrides
    given = tiny.optim_settings(**settings, learning_rate=0.05)
    given.warmup = "3 steps"
    tx = optim.make_optimizer(tiny.make_schedule(given, 10), given, seed=0).rule
    params = random_tree(0)
    gradients = [random_tree(seed, size=0.3 * seed) for seed in range(1, 9)]
    norms = [
        np.linalg.norm(np.concatenate([g.ravel() for g in jax.tree.leaves(t)])) for t in gradients
    ]
    assert norms[0] < 3 < norms[-1]

    state, moved = tx.init(params), params
    for gradient in gradients:
        updates, state = tx.update(gradient, state, moved)
        moved = jax.tree.map(lambda a, b: a + b, moved, updates)

    rates = [0.05 * _schedule(step, 3, 10) for step in range(len(gradients))]
    leaves = [named_leaves(gradient) for gradient in gradients]
    want = adamw(named_leaves(params), leaves, rates, **settings)
    start = named_leaves(params)
    for name, value in named_leaves(moved).items():
        assert np.abs(want[name] - start[name]).max() > 0.05, name  # it went somewhere
        np.testing.assert_allclose(value, want[name], rtol=0, atol=2e-6, err_msg=name)


def test_decay_is_decoupled():
    """Without gradients a kernel shrinks by learning rate x decay, whatever Adam's moments."""
    tx = optim.make_optimizer(lambda step: 0.1, tiny.optim_settings(**SETTINGS), seed=0).rule
    params = random_tree(0)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    kernel = params["text"]["mlp_in"]["kernel"]
    np.testing.assert_allclose(updates["text"]["mlp_in"]["kernel"], -0.1 * 0.2 * kernel, rtol=1e-6)
    for name, update in named_leaves(updates).items():
        assert name.endswith("kernel") or not update.any(), name


@pytest.mark.parametrize("peak", [1e-3, 4e-3])
def test_independent_decay_is_that_of_big_vision(peak: float):
    """The SigLIP recipe from its config, against the chain of big_vision's optimiser.

    There the peak scales Adam's update only, and the schedule scales what decay adds as well.
    """
    config = siglip_b16.get_config("smoke")
    config.optim.learning_rate = peak
    config.optim.warmup, config.duration = "2 steps", "10 steps"
    tx = program.build(config, examples=100).optimizer.rule

    def is_kernel(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.scale(peak),
        optax.add_decayed_weights(1e-4, mask=is_kernel),
        optax.scale_by_schedule(optax.warmup_cosine_decay_schedule(0.0, 1.0, 2, 10)),
        optax.scale(-1.0),
    )
    params = random_tree(0) | {"positions": np.ones(3, np.float32)}
    state, their_state = tx.init(params), theirs.init(params)
    for seed in range(1, 6):
        gradient = random_tree(seed) | {"positions": np.zeros(3, np.float32)}
        updates, state = tx.update(gradient, state, params)
        their_updates, their_state = theirs.update(gradient, their_state, params)
    want = named_leaves(their_updates)
    assert not want["positions"].any()
    for name, update in named_leaves(updates).items():
        np.testing.assert_allclose(update, want[name], rtol=1e-5, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(
    ("pattern", "found"), [("(", "regular expression"), ("head", "no parameter")]
)
def test_parameters_that_decay_are_checked(pattern: str, found: str):
    with pytest.raises(UserError, match=f"optim.decay_params .* {found}"):
        optim.decay_mask(random_tree(0), pattern)


# ---- Schedule ----------------------------------------------------------------------------------


def _schedule(step: int, warmup: int, total: int) -> float:
    """The fraction of the peak, as open_clip's schedulers have it."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def make_schedule(peak: float, warmup: int, total: int, **settings):
    given = tiny.optim_settings(learning_rate=peak, **settings)
    given.warmup = f"{warmup} steps"
    return tiny.make_schedule(given, total)


@pytest.mark.parametrize(("warmup", "total"), [(2000, 390_625), (5, 20), (0, 10), (1, 2), (9, 10)])
def test_schedule(warmup: int, total: int):
    schedule = make_schedule(5e-4, warmup, total)
    steps = {0, 1, warmup // 2, warmup, (warmup + total) // 2, total - 1, total}
    for step in steps:
        rate = float(schedule(jnp.int32(step)))
        assert rate == pytest.approx(5e-4 * _schedule(step, warmup, total), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize(("warmup", "total"), [(2000, 20), (1, 1), (0, 1)])
def test_warmup_longer_than_the_run(warmup: int, total: int):
    """The peak is reached at the last step, rather than never."""
    schedule = make_schedule(1.0, warmup, total)
    rates = [float(schedule(step)) for step in range(total)]
    assert max(rates) == rates[-1] == 1.0
    assert all(math.isfinite(rate) for rate in rates)


def test_a_rate_that_cools_down():
    """Against the definitions, in float64: big_vision's rsqrt, and the cooldowns of open_clip."""
    for schedule, shape, final in itertools.product(
        ("constant", "rsqrt"), ("linear", "sqrt"), (0.0, 0.1)
    ):
        rates = make_schedule(
            2.0, 10, 100, schedule=schedule, timescale="30 steps", cooldown="20 steps",
            cooldown_shape=shape, final_fraction=final,
        )  # fmt: skip
        for step in range(100):
            want = 2.0 * min((step + 1) / 10, 1)
            if schedule == "rsqrt":
                want /= math.sqrt(1 + max(step - 10, 0) / 30)
            passed = max(step - 80, 0) / 20
            left = 1 - (passed if shape == "linear" else math.sqrt(passed))
            want *= final + (1 - final) * left
            assert float(rates(jnp.int32(step))) == pytest.approx(want, rel=1e-5), step


def test_a_cosine_with_a_floor():
    rates = make_schedule(1.0, 0, 100, final_fraction=0.2)
    assert float(rates(0)) == 1.0
    assert float(rates(50)) == pytest.approx(0.6)
    assert float(rates(100)) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cooldown": "20 steps"}, "a cosine falls by itself"),
        ({"schedule": "constant", "cooldown": "95 steps"}, "105 steps, and the run has 100"),
    ],
)
def test_cooldowns_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        make_schedule(1.0, 10, 100, **settings)


# ---- Other rules -------------------------------------------------------------------------------

BLOCK = {"image": {"blocks": {"qkv": {"kernel": (2, 4, 3, 2, 2)}, "mlp_in": {"kernel": (2, 4, 6)}}}}
BLOCK["text"] = {"blocks": {"mlp_in": {"kernel": (2, 4, 2, 6)}}}  # with a gate


def shapes_of(name: str) -> dict:
    return SHAPES | BLOCK if name in ("lamb", "muon") else SHAPES


def one_rule(name, param, grads, *, b1, b2, eps, rate, decay, matrix):
    """The parameter after these gradients, float64, from the papers' formulas."""
    param = param.astype(np.float64)
    m, v = np.zeros_like(param), np.zeros_like(param)
    for t, grad in enumerate(grads, start=1):
        grad = grad.astype(np.float64)
        if name == "lion":
            update = np.sign(b1 * m + (1 - b1) * grad)
            m = b2 * m + (1 - b2) * grad
        elif name == "adafactor":  # too small to factor
            decay_rate = min(b2, 1 - t**-0.8)
            v = decay_rate * v + (1 - decay_rate) * (grad**2 + 1e-30)
            m = b1 * m + (1 - b1) * grad / np.sqrt(v)
            update = m
        elif name == "muon" and matrix:
            m = 0.95 * m + 0.05 * grad
            ahead = 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * grad / (1 - 0.95**t)
            x = ahead / np.linalg.norm(ahead)
            x = x.T if x.shape[0] > x.shape[1] else x
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = x if x.shape == grad.shape else x.T
            update = x * 0.2 * math.sqrt(max(x.shape))
        else:
            m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
            update = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        update = update + decay * param
        if name == "lamb":
            norms = np.linalg.norm(param), np.linalg.norm(update)
            update = update * (norms[0] / norms[1] if all(norms) else 1)
        param = param - rate * update
    return param


@pytest.mark.parametrize("name", ["lion", "adafactor", "lamb", "muon"])
def test_other_rules(name):
    """Layers of a stack, queries, keys and values, and gates are matrices of their own."""
    settings = tiny.optim_settings(
        name=name, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.1, learning_rate=0.05
    )
    tx = optim.make_optimizer(lambda _: 0.05, settings, seed=0).rule

    def draw(seed):
        rng = np.random.default_rng(seed)
        return jax.tree.map(
            lambda shape: rng.normal(size=shape).astype(np.float32), shapes_of(name), **IS_SHAPE
        )

    params, grads = draw(0), [draw(seed) for seed in range(1, 6)]
    state, moved = tx.init(params), params
    for grad in grads:
        updates, state = jax.jit(tx.update)(grad, state, moved)
        moved = jax.tree.map(jnp.add, moved, updates)
    start, got = named_leaves(params), named_leaves(moved)
    each = [named_leaves(grad) for grad in grads]
    for key, value in start.items():
        common = {"b1": 0.9, "b2": 0.98, "eps": 1e-6, "rate": 0.05, "name": name}
        common |= {"decay": 0.1 * key.endswith("kernel"), "matrix": "blocks" in key}
        parts: list = [(...,)]
        if "blocks" in key:
            parts = [(layer,) for layer in range(2)]
            if "qkv" in key and name == "muon":
                parts = [(layer, slice(None), part) for layer in range(2) for part in range(3)]
            if "text" in key and name == "muon":
                parts = [(layer, slice(None), part) for layer in range(2) for part in range(2)]
        for part in parts:
            rows = (value[part], [grad[key][part] for grad in each])
            if name == "muon" and "blocks" in key:
                shape = (rows[0].shape[0], -1)
                rows = rows[0].reshape(shape), [row.reshape(shape) for row in rows[1]]
            want = one_rule(param=rows[0], grads=rows[1], **common)
            found = got[key][part].reshape(want.shape)
            assert np.abs(want - rows[0]).max() > 0.01, key
            np.testing.assert_allclose(found, want, rtol=0, atol=1e-5, err_msg=f"{key} {part}")


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "lamb", "muon"])
def test_moments_in_16_bits_of_every_rule(name):
    settings = tiny.optim_settings(name=name, moment_dtype="bfloat16")
    tx = optim.make_optimizer(lambda _: 0.05, settings, seed=0).rule
    params = jax.tree.map(lambda shape: jnp.ones(shape), shapes_of(name), **IS_SHAPE)
    state = tx.init(params)
    _, after = jax.jit(tx.update)(params, state, params)
    for leaf, new in zip(jax.tree.leaves(state), jax.tree.leaves(after)):
        assert leaf.dtype == new.dtype
    moments = [x for x in jax.tree.leaves(after) if x.dtype == jnp.bfloat16]
    held = sum(x.size for x in moments)
    assert held >= sum(x.size for x in jax.tree.leaves(params))
    constants = [x for x in jax.tree.leaves(after) if x.dtype == jnp.float32]
    assert sum(x.size for x in constants) == (3 if name == "muon" else 0)


# ---- What decays -------------------------------------------------------------------------------

DECAYED = {"kernel", "embedding", "positions", "class_token"}
NOT_DECAYED = {"scale", "bias", "logit_scale"}  # paper, section 2.5: gains and biases


@pytest.mark.parametrize("name", ["ViT-B/32", "RN50"])
def test_which_parameters_decay(name: str):
    """Every parameter of both towers, by the last part of its path; a new name needs a choice."""
    net = models.create(name)
    size = net.size
    images = jnp.zeros((1, size.image_size, size.image_size, 3), jnp.uint8)
    tokens = jnp.zeros((1, size.context_length), jnp.int32)
    params = jax.eval_shape(net.init, jax.random.key(0), images, tokens)["params"]
    mask = jax.tree.leaves_with_path(optim.decay_mask(params, tiny.DECAY_PARAMS))
    assert len(mask) == len(jax.tree.leaves(params))
    kinds = set()
    for path, decays in mask:
        full = sharding.path_name(path)
        kind = full.split("/")[-1]
        assert kind in DECAYED | NOT_DECAYED, full
        assert decays == (kind in DECAYED), full
        kinds.add(kind)
    assert kinds >= NOT_DECAYED | {"kernel", "embedding", "positions"}
    # In a stack of layers gains and biases are matrices, so the rank would not tell them apart.
    stacked = params["text"]["transformer"]["blocks"]["ln_1"]["scale"]
    assert stacked.ndim == 2
