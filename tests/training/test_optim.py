"""The optimiser against NumPy float64, and what it leaves undecayed."""

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
STORAGE = {"moment_dtype": "float32", "seed": 0, "decay_params": tiny.DECAY_PARAMS}
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
    schedule = optim.make_schedule(0.05, 3, 10)
    tx = optim.make_optimizer(schedule, **settings, **STORAGE)
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
    tx = optim.make_optimizer(lambda step: 0.1, **SETTINGS, **STORAGE)
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
    tx = program.build(config, warmup=2, total=10).tx

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


@pytest.mark.parametrize(("warmup", "total"), [(2000, 390_625), (5, 20), (0, 10), (1, 2), (9, 10)])
def test_schedule(warmup: int, total: int):
    schedule = optim.make_schedule(5e-4, warmup, total)
    steps = {0, 1, warmup // 2, warmup, (warmup + total) // 2, total - 1, total}
    for step in steps:
        rate = float(schedule(jnp.int32(step)))
        assert rate == pytest.approx(5e-4 * _schedule(step, warmup, total), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize(("warmup", "total"), [(2000, 20), (1, 1), (0, 1)])
def test_warmup_longer_than_the_run(warmup: int, total: int):
    """The peak is reached at the last step, rather than never."""
    schedule = optim.make_schedule(1.0, warmup, total)
    rates = [float(schedule(step)) for step in range(total)]
    assert max(rates) == rates[-1] == 1.0
    assert all(math.isfinite(rate) for rate in rates)


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
