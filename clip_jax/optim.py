"""The paper's optimiser: AdamW with decoupled decay, linear warm-up, cosine to zero.

Two ways to save memory (section 2.5): bfloat16 moments, and bfloat16 for chosen parameters, both
with stochastic rounding.
"""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float32, Int32, Key, UInt32

from clip_jax import sharding
from clip_jax.errors import UserError


def make_schedule(peak: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Returns the learning rate by step, counted from 0: a linear warm-up, then a cosine to 0.

    As in open_clip, the first step has peak / warmup_steps and the last of the warm-up the peak;
    a first step with rate 0 would change nothing. big_vision's warm-up has exactly that, and so is
    one step behind. A warm-up as long as the run is shortened.
    """
    warmup_steps = min(warmup_steps, max(total_steps - 1, 0))
    cosine = optax.cosine_decay_schedule(peak, max(total_steps - warmup_steps, 1))
    if not warmup_steps:
        return cosine
    warmup = optax.linear_schedule(peak / warmup_steps, peak, max(warmup_steps - 1, 1))
    return optax.join_schedules([warmup, cosine], [warmup_steps])


def make_optimizer(
    schedule: optax.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    decay_params: str,
    grad_clip_norm: float,
    moment_dtype: str,
    seed: int,
) -> optax.GradientTransformation:
    """Makes AdamW, which takes float32 gradients.

    Args:
      schedule: learning rate by step.
      b1: decay rate of Adam's first moment.
      b2: decay rate of its second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled: a step takes this times the learning rate from each parameter, in
        proportion to the parameter.
      decay_params: regular expression on the paths of the parameters that decay.
      grad_clip_norm: bound on the global gradient norm, applied first; 0: none.
      moment_dtype: storage of both moments; "bfloat16" takes stochastic rounding.
      seed: PRNG seed of that rounding.
    """
    clip = optax.clip_by_global_norm(grad_clip_norm) if grad_clip_norm else optax.identity()
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    return optax.chain(
        clip,
        _bf16_moments(adam, seed) if moment_dtype == "bfloat16" else adam,
        optax.add_decayed_weights(weight_decay, mask=partial(decay_mask, pattern=decay_params)),
        optax.scale_by_learning_rate(schedule),
    )


def updates_applied(opt_state: Any) -> Int32[Array, ""]:
    """Returns the number of updates in a state of `make_optimizer`, which its schedule counts."""
    return opt_state[-1].count


def decay_mask(params: Any, pattern: str) -> Any:
    """Returns True for the parameters whose path the regular expression finds.

    Raises:
      UserError: the pattern is no regular expression, or finds nothing.
    """
    return _find_params(params, pattern, "optim.decay_params")


def _bf16_moments(adam: optax.GradientTransformation, seed: int) -> optax.GradientTransformation:
    """Keeps both moments in bfloat16 between steps; the arithmetic stays float32."""

    def init(params: Any) -> optax.ScaleByAdamState:
        state: Any = adam.init(params)
        mu, nu = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (state.mu, state.nu))
        return optax.ScaleByAdamState(state.count, mu, nu)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, moved = adam.update(updates, to_float32(state), params)
        new: Any = moved
        # The second moment changes by 1 - b2 of itself a step: to nearest, it would stand still.
        key = jax.random.fold_in(jax.random.key(seed), new.count)
        mu, nu = round_tree((new.mu, new.nu), (state.mu, state.nu), key)
        return updates, optax.ScaleByAdamState(new.count, mu, nu)

    return optax.GradientTransformation(init, update)


def to_bf16(params: Any, pattern: str) -> Any:
    """Casts the parameters whose path the regular expression finds to bfloat16; "": none.

    Raises:
      UserError: the pattern is no regular expression, or finds nothing.
    """
    if not pattern:
        return params
    found = _find_params(params, pattern, "optim.bf16_params")
    return jax.tree.map(lambda x, half: x.astype(jnp.bfloat16) if half else x, params, found)


def _find_params(params: Any, pattern: str, setting: str) -> Any:
    """Returns True for the parameters whose path the regular expression of a setting finds."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"{setting} {pattern!r} is no regular expression: {error}.") from None
    found = jax.tree_util.tree_map_with_path(
        lambda path, _: bool(expression.search(sharding.path_name(path))), params
    )
    if not any(jax.tree.leaves(found)):
        raise UserError(
            f"{setting} {pattern!r} finds no parameter: their paths begin with "
            f"{', '.join(sorted(params))}."
        )
    return found


def apply_updates(params: Any, updates: Any, key: Key[Array, ""]) -> Any:
    """Adds updates to parameters in float32; bfloat16 parameters take stochastic rounding."""
    return round_tree(optax.apply_updates(to_float32(params), updates), params, key)


# --- Stochastic rounding ---


def stochastic_round(x: Float32[Array, "*shape"], key: Key[Array, ""]) -> BFloat16[Array, "*shape"]:
    """Rounds to one of the two neighbours in bfloat16, with the probabilities that keep the mean.

    Rounding to nearest would lose an update that is smaller than half the distance to the next
    number, 1/512 of the value, however often it comes. Infinities and NaN stay as they are.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # bfloat16 is the upper half of a float32: noise in the lower half carries over as often as
    # the lower half is far from zero.
    upper = ((bits + (_noise(key, x.shape) >> 16)) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _noise(key: Key[Array, ""], shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Hashes the place of each element of an array of this shape, seeded by the key.

    A tenth of the operations of `jax.random.bits`, which would take as long as a small model's
    step; the constants are those of a mixer found by search for least bias (Wellons 2018).
    """
    offset, seed = jax.random.bits(key, (2,), jnp.uint32)
    place = jnp.zeros(shape, jnp.uint32)
    for dimension, length in enumerate(shape):
        place = place * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, shape, dimension)
    x = (place + offset) ^ seed
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def round_tree(tree: Any, like: Any, key: Key[Array, ""]) -> Any:
    """Rounds float32 leaves to the dtypes of `like`, each with noise of its own."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten(
        stochastic_round(leaf, jax.random.fold_in(key, i)) if old.dtype == jnp.bfloat16 else leaf
        for i, (leaf, old) in enumerate(zip(leaves, jax.tree.leaves(like)))
    )


def to_float32(tree: Any) -> Any:
    """Casts bfloat16 leaves to float32 and leaves others alone."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x,
        tree,
    )
