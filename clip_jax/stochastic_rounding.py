"""Random rounding to bfloat16: what small updates add up to is right on average."""

from typing import Any

import jax
import jax.numpy as jnp


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds to one of the two neighbours in bfloat16, with the odds that keep the mean.

    Rounding to nearest would lose an update that is smaller than half the distance to the next
    number, 1/512 of the value, however often it comes.

    Args:
      x: float32, any shape.
      key: PRNG key.

    Returns:
      bfloat16, like x; infinities and NaN as they are.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # bfloat16 is the upper half of a float32: noise in the lower half carries over as often as
    # the lower half is far from zero.
    upper = ((bits + (_noise(key, x.shape) >> 16)) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32 of this shape: a hash of each element's place, seeded by the key.

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


def round_tree(tree: Any, like: Any, key: jax.Array) -> Any:
    """Brings float32 leaves to the dtypes of `like`, each with noise of its own."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten(
        stochastic_round(leaf, jax.random.fold_in(key, i)) if old.dtype == jnp.bfloat16 else leaf
        for i, (leaf, old) in enumerate(zip(leaves, jax.tree.leaves(like)))
    )


def to_float32(tree: Any) -> Any:
    """bfloat16 leaves as float32, others as they are."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x,
        tree,
    )
