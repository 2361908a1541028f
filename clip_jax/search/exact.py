"""Exact search: compares every query with every embedding, block by block on the devices."""

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int32, Integer

from clip_jax import sharding

_QUERIES = 1024  # queries at a time


class Best(NamedTuple):
    """The best rows of each query, best first.

    Attributes:
      scores: cosines; -inf where there are fewer rows than k.
      rows: numbers of the rows; -1 there.
    """

    scores: Float32[np.ndarray, "queries k"]
    rows: Int32[np.ndarray, "queries k"]


class Block(NamedTuple):
    """Embeddings on the devices of a mesh.

    Attributes:
      embeds: rows, split over the devices; float16 or float32.
      first: number of the first row.
      count: number of rows; the others are zeros.
    """

    embeds: Float[Array, "devices rows embed"]
    first: int
    count: int


def put_blocks(
    blocks: Iterable[Float[np.ndarray, "_ embed"]], rows: int, mesh: Mesh
) -> Iterator[Block]:
    """Moves embeddings onto the devices, one block at a time.

    Args:
      blocks: embeddings in order, at most `rows` each; fewer than 2^31 rows in all.
      rows: size to which every block is padded, for all to share a program.
      mesh: this host's devices.
    """
    first, devices = 0, mesh.size
    for block in blocks:
        padded = np.zeros((-(-rows // devices) * devices, block.shape[1]), block.dtype)
        padded[: len(block)] = block
        split = padded.reshape(devices, -1, block.shape[1])
        embeds = jax.device_put(split, sharding.batch_sharding(mesh))
        yield Block(embeds, first, len(block))
        first += len(block)


def search(
    blocks: Iterable[Block], queries: Float32[np.ndarray, "queries embed"], k: int, mesh: Mesh
) -> Best:
    """Finds the k rows with the highest cosine; of equal ones those with the lowest numbers.

    Products are float32 whatever the dtype of the blocks. Memory on the devices: the queries, two
    blocks, and 1024 rows of scores against it.

    Args:
      blocks: unit vectors.
      queries: unit vectors.
      k: number of results, at least 1.
      mesh: devices of the blocks.
    """
    size = min(_QUERIES, len(queries))
    tiles = [queries[start : start + size] for start in range(0, len(queries), size or 1)]
    if not tiles:
        return Best(np.zeros((0, k), np.float32), np.zeros((0, k), np.int32))
    tiles[-1] = np.pad(tiles[-1], ((0, size - len(tiles[-1])), (0, 0)))
    nothing = np.full((size, k), -np.inf, np.float32), np.full((size, k), -1, np.int32)
    whole, merge = sharding.replicated(mesh), _program(mesh)
    best = [jax.device_put(nothing, whole) for _ in tiles]
    held = [jax.device_put(tile, whole) for tile in tiles]
    for block in blocks:
        jax.block_until_ready(best)  # else blocks would pile up in device memory
        for number, tile in enumerate(held):
            best[number] = merge(best[number], tile, block.embeds, block.first, block.count)
    scores, rows = (np.concatenate(parts)[: len(queries)] for parts in zip(*best))
    return Best(scores, rows)


@functools.cache
def _program(mesh: Mesh):
    """Compiles `_merge`; its results have the sharding of its arguments, so it compiles once."""
    return jax.jit(_merge, donate_argnums=0, out_shardings=sharding.replicated(mesh))


def _merge(
    best: tuple[Float32[Array, "queries k"], Int32[Array, "queries k"]],
    queries: Float32[Array, "queries embed"],
    embeds: Float[Array, "devices rows embed"],
    first: Integer[Array, ""],
    count: Integer[Array, ""],
) -> tuple[Float32[Array, "queries k"], Int32[Array, "queries k"]]:
    """Merges the best so far with those of a block; of equal ones the former come first."""
    devices, rows, _ = embeds.shape
    k = best[0].shape[1]
    positions = jnp.arange(devices * rows, dtype=jnp.int32).reshape(devices, 1, rows)
    products = jnp.einsum(
        "qe,dre->dqr", queries, embeds.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    scores = jnp.where(positions < count, products, -jnp.inf)
    # First on each device alone: only k candidates per device cross the network.
    scores, taken = jax.lax.top_k(scores, min(k, rows))
    numbers = first + taken + (jnp.arange(devices, dtype=jnp.int32) * rows)[:, None, None]
    numbers = jnp.where(scores > -jnp.inf, numbers, -1)
    both = [
        jnp.concatenate([old, new.swapaxes(0, 1).reshape(len(old), -1)], axis=1)
        for old, new in zip(best, (scores, numbers))
    ]
    scores, taken = jax.lax.top_k(both[0], k)
    return scores, jnp.take_along_axis(both[1], taken, axis=1)
