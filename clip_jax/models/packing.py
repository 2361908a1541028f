"""Packing: several captions share a row of the text tower, so no compute is spent on padding.

Everything has a static shape and runs on the device.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from clip_jax import sharding
from clip_jax.models.image_model import end_places
from clip_jax.models.transformer import Read

# (params, ids, positions, mask, read) -> states of the last layer at the tokens that `read` picks;
# the arrays are int32 [r, l] twice and bool [r, 1, l, l].
Tower = Callable[[Any, jax.Array, jax.Array, jax.Array, Read], jax.Array]
# (params, tokens, places, first row) -> features of the captions in some of the rows.
Round = Callable[[Any, jax.Array, "Places", jax.Array | int], jax.Array]


class Packing(NamedTuple):
    """Settings of packing.

    Attributes:
      length: tokens in a row, no fewer than the longest caption has.
      rows: rows per caption that are always computed; if a batch needs more, further rounds of as
        many rows are computed.
    """

    length: int
    rows: float


class Places(NamedTuple):
    """The place of each of n captions, or of those of several shards."""

    row: Int[Array, "*captions"]
    offset: Int[Array, "*captions"]  # place of its first token within the row
    length: Int[Array, "*captions"]  # number of its tokens, end token included


class Rows(NamedTuple):
    """Packed tokens; zero where there is none."""

    ids: Int[Array, "rows length"]
    positions: Int[Array, "rows length"]  # within the caption
    captions: Int[Array, "rows length"]  # 1 + the number of the caption


def place(
    tokens: Int[Array, "captions longest"], length: int, end_token: int | None = None
) -> Places:
    """Places captions by first fit, the longest first: each in the first row with room for it.

    Args:
      tokens: captions, each up to its end token; none longer than a row.
      length: tokens in a row.
      end_token: id of the end token; None: the largest id of each caption.

    Returns:
      Places in no more than `rows_needed` rows, which suffice for any captions: where a caption
      did not fit, each row would hold more than length - s tokens, and so length // s captions.
    """
    captions, longest = tokens.shape
    count = rows_needed(captions, longest, length)
    lengths = jnp.asarray(end_places(tokens, end_token), jnp.int32) + 1
    sizes = jnp.arange(longest, 0, -1, dtype=jnp.int32)

    # All captions of a length are placed at once: sequential steps are as many as there are
    # lengths, however many captions. Each step costs several kernel launches on a GPU.
    def put(free, group):
        size, number = group
        room = free // size
        taken = jnp.clip(number - (jnp.cumsum(room) - room), 0, room)
        return free - taken * size, (taken, length - free)

    numbers = jnp.sum(lengths == sizes[:, None], axis=1, dtype=jnp.int32)
    free = jnp.full(count, length, jnp.int32)
    _, (taken, offset) = jax.lax.scan(put, free, (sizes, numbers))
    # The sorted captions are dealt out in this order: by size, then by row.
    taken, offset = taken.reshape(-1), offset.reshape(-1)
    ends, dealt = jnp.cumsum(taken), jnp.arange(captions, dtype=jnp.int32)
    part = jnp.searchsorted(ends, dealt, side="right").astype(jnp.int32)
    offset = offset[part] + (dealt - (ends - taken)[part]) * sizes[part // count]
    rank = jnp.argsort(jnp.argsort(-lengths))
    return Places((part % count)[rank], offset[rank], lengths)


def rows_needed(captions: int, longest: int, length: int) -> int:
    """Counts the rows that suffice for any captions of up to `longest` tokens."""
    return -(-captions // (length // longest))


def fill(
    tokens: Int[Array, "captions longest"],
    places: Places,
    first: Int[Array, ""] | int,
    count: int,
    length: int,
) -> Rows:
    """Fills `count` packed rows, from number `first` on.

    Args:
      tokens: captions.
      places: their places.
      first: number of the first row.
      count: rows to fill; captions in others are left out.
      length: tokens in a row.
    """
    row = places.row - first
    inside = (row >= 0) & (row < count)
    start = jnp.where(inside, row * length + places.offset, count * length)
    marks = jnp.zeros(count * length, jnp.int32)
    marks = marks.at[start].set(1 + jnp.arange(len(tokens), dtype=jnp.int32), mode="drop")
    marks = marks.reshape(count, length)
    # A token belongs to the last caption that begins before it: rows are filled from the left.
    here = jnp.arange(length, dtype=jnp.int32)
    begin = jax.lax.cummax(jnp.where(marks > 0, here, 0), axis=1)
    captions = jnp.take_along_axis(marks, begin, axis=1)
    caption = jnp.maximum(captions - 1, 0)
    positions = here - begin
    valid = (captions > 0) & (positions < places.length[caption])
    positions = jnp.where(valid, positions, 0)
    ids = jnp.where(valid, tokens[caption, positions], 0)
    return Rows(ids, positions, jnp.where(valid, captions, 0))


def attention_mask(
    captions: Int[Array, "rows length"],
) -> Bool[Array, "rows 1 length length"]:
    """Masks attention by `Rows.captions`: a token sees its caption up to itself."""
    same = captions[:, :, None] == captions[:, None, :]
    return (same & jnp.tri(captions.shape[1], dtype=bool))[:, None]


def end_features(
    tower: Tower,
    further_tower: Tower,
    params: Any,
    tokens: Int[Array | np.ndarray, "batch longest"],
    packing: Packing,
    end_token: int | None = None,
) -> Float[Array, "batch width"]:
    """Computes the states at the end tokens, equal to those of captions in rows of their own.

    A first round computes ceil(packing.rows * n) rows. Where captions remain, further rounds of as
    many rows follow, one at a time and recomputed in the backward pass, so that memory stays that
    of one round.

    Args:
      tower: the causal text tower.
      further_tower: the same tower for further rounds, which may be compiled otherwise.
      params: parameters of both.
      tokens: captions, split over the batch axes of the mesh if one is set.
      packing: settings of packing.
      end_token: see `place`.

    Returns:
      States in the dtype of the tower.

    Raises:
      ValueError: the batch cannot be split over the mesh.
    """
    shards = _shards()
    if tokens.shape[0] % shards:
        raise ValueError(f"{tokens.shape[0]} captions cannot be split over {shards} devices")
    captions, longest = tokens.shape[0] // shards, tokens.shape[1]
    most = rows_needed(captions, longest, packing.length)
    count = min(math.ceil(packing.rows * captions), most)
    # The captions of each batch shard are packed among themselves: no activation crosses devices.
    tokens = sharding.constrain_batch(jnp.reshape(tokens, (shards, captions, longest)))
    places = jax.vmap(lambda shard: place(shard, packing.length, end_token))(tokens)
    further = None
    if most > count:
        further_round = partial(_round, further_tower, count, packing.length)
        further, params = _further_rounds(further_round, params, tokens, places, count)
    features = _round(tower, count, packing.length, params, tokens, places, 0)
    features = features if further is None else features + further
    return features.reshape(shards * captions, -1)


def _round(
    tower: Tower,
    count: int,
    length: int,
    params: Any,
    tokens: Int[Array, "shards captions longest"],
    places: Places,
    first: Int[Array, ""] | int,
) -> Float[Array, "shards captions width"]:
    """Computes features of the captions in rows first to first + count; zero for all others."""
    shards = tokens.shape[0]
    rows = jax.vmap(lambda t, p: fill(t, p, first, count, length))(tokens, places)
    ids, positions, captions = (
        sharding.constrain_batch(leaf.reshape(shards * count, length)) for leaf in rows
    )
    row = places.row - first
    inside = (row >= 0) & (row < count)
    end = jnp.where(inside, row * length + places.offset + places.length - 1, 0)

    def read(x):
        x = sharding.constrain_batch(x.reshape(shards, count * length, *x.shape[2:]))
        return sharding.constrain_batch(pick(x, end))

    x = tower(params, ids, positions, attention_mask(captions), read)
    return sharding.constrain_batch(jnp.where(inside[:, :, None], x, 0))


def pick(
    x: Shaped[Array, "batch length *features"], places: Int[Array, "batch n"]
) -> Shaped[Array, "batch n *features"]:
    """Picks the tokens at these places."""
    return jnp.take_along_axis(x, places.reshape(*places.shape, *[1] * (x.ndim - 2)), axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def _further_rounds(
    further_round: Round,
    params: Any,
    tokens: Int[Array, "shards captions longest"],
    places: Places,
    count: int,
) -> tuple[Float[Array, "shards captions width"], Any]:
    """Returns the sum of the rounds after the first, and the parameters for the first to use.

    The parameters pass through: so their gradient from the first round is complete when the
    backward pass of the further rounds begins. By then the activations of the first round are
    freed; and where there are no further rounds, the gradient passes as it is, without a sum with
    zeros.
    """
    like = jax.eval_shape(further_round, params, tokens, places, 0)
    nothing = sharding.constrain_batch(jnp.zeros(like.shape, like.dtype))

    def add(i, total):
        return total + further_round(params, tokens, places, i * count)

    # The trip count is known on the device only: no caption left, no iteration.
    return jax.lax.fori_loop(1, _rounds(places, count), add, nothing), params


def _further_forward(
    further_round: Round,
    params: Any,
    tokens: Int[Array, "shards captions longest"],
    places: Places,
    count: int,
) -> tuple[tuple[Float[Array, "shards captions width"], Any], tuple]:
    residuals = (params, tokens, places)
    return _further_rounds(further_round, params, tokens, places, count), residuals


def _further_backward(
    further_round: Round, count: int, saved: tuple, gradients: tuple
) -> tuple[Any, None, None]:
    params, tokens, places = saved
    of_features, of_params = gradients

    def add(i, total):
        _, backward = jax.vjp(
            lambda params: further_round(params, tokens, places, i * count), params
        )
        return jax.tree.map(jnp.add, total, backward(of_features)[0])

    return jax.lax.fori_loop(1, _rounds(places, count), add, of_params), None, None


_further_rounds.defvjp(_further_forward, _further_backward)


def _rounds(places: Places, count: int) -> Int[Array, ""]:
    """Counts the rounds that the fullest shard needs; equal on all devices, which loop together."""
    last = jnp.max(places.row)
    return sharding.constrain_batch(last, PartitionSpec()) // count + 1


def _shards() -> int:
    """Counts the parts that the mesh, if one is set, splits a batch into."""
    mesh = jax.sharding.get_abstract_mesh()
    split = set(sharding.AXES) <= set(mesh.axis_names)
    return math.prod(mesh.shape[axis] for axis in sharding.BATCH[0]) if split else 1
