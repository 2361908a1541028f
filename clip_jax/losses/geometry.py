"""Alignment and uniformity of embeddings (Wang & Isola 2020, arXiv:2005.10242)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.losses.terms import Scalar, dot

ROWS = 256  # examples whose pairs the uniformity averages over, at most


def alignment(images: Float[Array, "batch embed"], texts: Float[Array, "batch embed"]) -> Scalar:
    """Computes the mean squared distance of the pairs that belong together, in float32."""
    difference = images.astype(jnp.float32) - texts.astype(jnp.float32)
    return jnp.mean(jnp.sum(jnp.square(difference), axis=1))


def uniformity(embeds: Float[Array, "batch embed"]) -> Scalar:
    """Computes log E exp(-2 d^2), d being the distance of two different examples, in float32.

    The mean is over all pairs of evenly spaced examples of the batch, at most `ROWS` of them: all
    pairs of a large batch would cost a second product as large as that of the loss. The examples
    are chosen by their place in the batch, so they are the same on every mesh.

    Args:
      embeds: two at least.
    """
    stride = -(-len(embeds) // ROWS)
    count = len(embeds) // stride
    # A reshape, not a strided slice: each device cuts its own rows out, and no more are sent.
    chosen = embeds[: count * stride].reshape(count, stride, -1)[:, 0].astype(jnp.float32)
    lengths = jnp.sum(jnp.square(chosen), axis=1)
    squares = lengths[:, None] + lengths - 2 * dot("ne,me->nm", chosen, chosen)
    different = ~jnp.eye(count, dtype=bool)
    return jnp.log(jnp.mean(jnp.exp(-2 * squares), where=different))
