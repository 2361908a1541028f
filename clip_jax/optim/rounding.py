"""Parameters and optimiser state in bfloat16, with stochastic rounding (section 2.5)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float32, Int32, Key, UInt32

from clip_jax import sharding
from clip_jax.optim import paths


def to_bf16(params: Any, pattern: str) -> Any:
    """Casts the parameters whose path the regular expression finds to bfloat16; "": none.

    Raises:
      UserError: the pattern is no regular expression, or finds nothing.
    """
    if not pattern:
        return params
    found = paths.find(params, pattern, "optim.bf16_params")
    return jax.tree.map(lambda x, half: x.astype(jnp.bfloat16) if half else x, params, found)


def bf16_state(tx: optax.GradientTransformation, seed: int) -> optax.GradientTransformation:
    """Keeps the moments of an optimiser in bfloat16 between steps; the arithmetic stays float32.

    Args:
      tx: an optimiser that counts its steps.
      seed: PRNG seed of the rounding.
    """

    def init(params: Any) -> Any:
        names = tuple(sharding.path_name(path) for path, _ in jax.tree.leaves_with_path(params))

        def halve(path: tuple, x: jax.Array) -> jax.Array:
            moment = sharding.path_name(path).endswith(names) and x.dtype == jnp.float32
            return x.astype(jnp.bfloat16) if moment else x

        return jax.tree_util.tree_map_with_path(halve, tx.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, moved = tx.update(updates, to_float32(state), params)
        # A second moment changes by 1 - b2 of itself a step: to nearest, it would stand still.
        key = jax.random.fold_in(jax.random.key(seed), _count(moved))
        return updates, round_tree(moved, state, key)

    return optax.GradientTransformation(init, update)


def _count(state: Any) -> Int32[Array, ""]:
    return next(x for x in jax.tree.leaves(state) if x.dtype == jnp.int32)


def apply_updates(params: Any, updates: Any, key: Key[Array, ""]) -> Any:
    """Adds updates to parameters in float32; bfloat16 parameters take stochastic rounding."""
    return round_tree(optax.apply_updates(to_float32(params), updates), params, key)


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
