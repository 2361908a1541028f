"""Several captions in a row of the text tower, so that it computes tokens instead of padding.

Everything has a static shape and runs on the device. The captions of each batch shard are packed
among themselves, so that no activation crosses devices.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from clip_jax import sharding
from clip_jax.models.transformer import Read

# (params, ids, positions, mask, read) -> states of the last layer at the tokens that `read` picks;
# the arrays are int32 [r, l] twice and bool [r, 1, l, l].
Tower = Callable[[Any, jax.Array, jax.Array, jax.Array, Read], jax.Array]
# (params, tokens, places, first row) -> features of the captions in some of the rows.
Turn = Callable[[Any, jax.Array, "Places", jax.Array | int], jax.Array]


class Pack(NamedTuple):
    """How captions are packed.

    Attributes:
      length: tokens in a row, no fewer than the longest caption has.
      rows: rows per caption that are always computed; if a batch needs more, the others are
        computed as well, so many at a time.
    """

    length: int
    rows: float


class Places(NamedTuple):
    """Where each of n captions lies, int32 [n] each."""

    row: jax.Array
    offset: jax.Array  # of its first token within the row
    length: jax.Array  # its tokens, up to and with the end token


class Rows(NamedTuple):
    """Packed tokens, int32 [rows, length] each; zero where there is none."""

    ids: jax.Array
    positions: jax.Array  # within the caption
    captions: jax.Array  # 1 + the number of the caption


def place(tokens: jax.Array, length: int) -> Places:
    """First fit, the longest captions first: each goes to the first row that has room for it.

    All captions of a length are placed at once, so that the steps that wait for each other are as
    many as there are lengths, however many captions: each costs several launches on a GPU.

    Args:
      tokens: int32 [n, s], s <= length; a caption ends with its largest id.
      length: of a row.

    Returns:
      Places in no more than `rows_needed` rows, which suffice for any captions: where a caption
      did not fit, each row would hold more than length - s tokens, and so length // s captions.
    """
    captions, longest = tokens.shape
    count = rows_needed(captions, longest, length)
    lengths = jnp.argmax(tokens, axis=1).astype(jnp.int32) + 1
    sizes = jnp.arange(longest, 0, -1, dtype=jnp.int32)

    def put(free: jax.Array, group: tuple[jax.Array, jax.Array]):
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
    """Rows in which `place` puts any captions of up to `longest` tokens."""
    return -(-captions // (length // longest))


def fill(
    tokens: jax.Array, places: Places, first: jax.Array | int, count: int, length: int
) -> Rows:
    """The packed rows from number `first` on, `count` of them.

    Args:
      tokens: int32 [n, s].
      places: of these captions.
      first: int32 [].
      count: rows to fill; captions in others are left out.
      length: of a row.
    """
    row = places.row - first
    inside = (row >= 0) & (row < count)
    start = jnp.where(inside, row * length + places.offset, count * length)
    marks = jnp.zeros(count * length, jnp.int32)
    marks = marks.at[start].set(1 + jnp.arange(len(tokens), dtype=jnp.int32), mode="drop")
    marks = marks.reshape(count, length)
    # A token is of the caption that begins last before it: rows are filled from the left.
    here = jnp.arange(length, dtype=jnp.int32)
    begin = jax.lax.cummax(jnp.where(marks > 0, here, 0), axis=1)
    captions = jnp.take_along_axis(marks, begin, axis=1)
    caption = jnp.maximum(captions - 1, 0)
    positions = here - begin
    valid = (captions > 0) & (positions < places.length[caption])
    positions = jnp.where(valid, positions, 0)
    ids = jnp.where(valid, tokens[caption, positions], 0)
    return Rows(ids, positions, jnp.where(valid, captions, 0))


def attention_mask(captions: jax.Array) -> jax.Array:
    """`Rows.captions` [r, l] -> bool [r, 1, l, l]: a token sees its caption up to itself."""
    same = captions[:, :, None] == captions[:, None, :]
    return (same & jnp.tri(captions.shape[1], dtype=bool))[:, None]


def end_features(
    tower: Tower, further_tower: Tower, params: Any, tokens: jax.Array, pack: Pack
) -> jax.Array:
    """The states at the end tokens, the same as if each caption had a row of its own.

    A first turn computes ceil(pack.rows * n) rows. Where captions remain, further turns of as many
    rows follow, one at a time and recomputed in the backward pass, so that memory stays that of
    one turn; where none does, there are none.

    Args:
      tower: the causal text tower.
      further_tower: the same for further turns, perhaps otherwise compiled.
      params: of both.
      tokens: int32 [b, s], split over the batch axes of the mesh if one is set.
      pack: how to pack.

    Returns:
      [b, w], in the dtype of the tower.

    Raises:
      ValueError: the batch cannot be split over the mesh.
    """
    shards = _shards()
    if tokens.shape[0] % shards:
        raise ValueError(f"{tokens.shape[0]} captions cannot be split over {shards} devices")
    captions, longest = tokens.shape[0] // shards, tokens.shape[1]
    most = rows_needed(captions, longest, pack.length)
    count = min(math.ceil(pack.rows * captions), most)
    tokens = sharding.constrain_batch(tokens.reshape(shards, captions, longest))
    places = jax.vmap(lambda shard: place(shard, pack.length))(tokens)
    further = None
    if most > count:
        turn = partial(_turn, further_tower, count, pack.length)
        further, params = _further_turns(turn, params, tokens, places, count)
    features = _turn(tower, count, pack.length, params, tokens, places, 0)
    features = features if further is None else features + further
    return features.reshape(shards * captions, -1)


def _turn(
    tower: Tower,
    count: int,
    length: int,
    params: Any,
    tokens: jax.Array,
    places: Places,
    first: jax.Array | int,
) -> jax.Array:
    """[d, n, s] of d shards -> [d, n, w]; zero for captions not in rows first to first + count."""
    shards = tokens.shape[0]
    rows = jax.vmap(lambda t, p: fill(t, p, first, count, length))(tokens, places)
    ids, positions, captions = (
        sharding.constrain_batch(leaf.reshape(shards * count, length)) for leaf in rows
    )
    row = places.row - first
    inside = (row >= 0) & (row < count)
    end = jnp.where(inside, row * length + places.offset + places.length - 1, 0)

    def read(x: jax.Array) -> jax.Array:
        x = sharding.constrain_batch(x.reshape(shards, count * length, *x.shape[2:]))
        return sharding.constrain_batch(pick(x, end))

    x = tower(params, ids, positions, attention_mask(captions), read)
    return sharding.constrain_batch(jnp.where(inside[:, :, None], x, 0))


def pick(x: jax.Array, places: jax.Array) -> jax.Array:
    """[b, s, ...] and int32 [b, n] -> [b, n, ...] of the tokens at these places."""
    return jnp.take_along_axis(x, places.reshape(*places.shape, *[1] * (x.ndim - 2)), axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def _further_turns(
    turn: Turn, params: Any, tokens: jax.Array, places: Places, count: int
) -> tuple[jax.Array, Any]:
    """The sum of the turns after the first, and the parameters for the first to use.

    The parameters pass through so that in the backward pass their gradient arrives from the first
    turn complete: that is when its activations are gone and, where there are no further turns, the
    gradient goes on untouched, without a sum with zeros.
    """
    like = jax.eval_shape(turn, params, tokens, places, 0)
    nothing = sharding.constrain_batch(jnp.zeros(like.shape, like.dtype))

    def add(i, total):
        return total + turn(params, tokens, places, i * count)

    return jax.lax.fori_loop(1, _turns(places, count), add, nothing), params


def _further_forward(turn: Turn, params: Any, tokens: jax.Array, places: Places, count: int):
    return _further_turns(turn, params, tokens, places, count), (params, tokens, places)


def _further_backward(turn: Turn, count: int, saved: tuple, gradients: tuple):
    params, tokens, places = saved
    of_features, of_params = gradients

    def add(i, total):
        _, backward = jax.vjp(lambda params: turn(params, tokens, places, i * count), params)
        return jax.tree.map(jnp.add, total, backward(of_features)[0])

    return jax.lax.fori_loop(1, _turns(places, count), add, of_params), None, None


_further_turns.defvjp(_further_forward, _further_backward)


def _turns(places: Places, count: int) -> jax.Array:
    """That the fullest shard needs, int32 []; the same on all devices, which loop together."""
    last = jnp.max(places.row)
    return sharding.constrain_batch(last, PartitionSpec()) // count + 1


def _shards() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    split = set(sharding.AXES) <= set(mesh.axis_names)
    return math.prod(mesh.shape[axis] for axis in sharding.BATCH[0]) if split else 1
