"""Exact ranks between many images and many texts, one tile of similarities at a time.

Every tile is a product computed once that serves both directions: its rows are images that look
for texts, its columns texts that look for images. Before that, the tiles that hold right pairs are
visited for the scores of these. Both passes run the same compiled product on the same rows, so that
a score is the same number wherever it is needed, and equal embeddings tie exactly.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clip_jax.sharding import AXES, EVERY_AXIS

# Images, and texts on each device, of a tile: 16 MiB of scores.
TILE = (1024, 4096)
_UNIT = 128  # both are multiples of it

Progress = Callable[[int, int], None]  # tiles done, tiles in all


class Ranks(NamedTuple):
    """For each query, how many wrong candidates come before its best right one; 0: it is first.

    Attributes:
      image_to_text: int32 [n], of the images.
      text_to_image: int32 [m], of the texts.
    """

    image_to_text: np.ndarray
    text_to_image: np.ndarray


def group_pairs(image_groups: np.ndarray, text_groups: np.ndarray) -> np.ndarray:
    """Pairs (image, text) whose groups agree: int [n], int [m] -> int64 [p, 2], by image."""
    order = np.argsort(text_groups, kind="stable")
    ordered = np.asarray(text_groups)[order]
    first, end = (np.searchsorted(ordered, image_groups, side) for side in ("left", "right"))
    counts = end - first
    images = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([images, order[np.repeat(first, counts) + within]], axis=1)


def match_ranks(
    images: np.ndarray,
    texts: np.ndarray,
    pairs: np.ndarray,
    mesh: Mesh,
    *,
    tile: tuple[int, int] = TILE,
    progress: Progress | None = None,
) -> Ranks:
    """The ranks in both directions. Ties and NaN count against the model.

    Similarities are products in float32. Memory beyond the arguments: a few tiles, and a few
    numbers per image, text and pair. The first pass is short where right pairs lie together, as
    with texts in the order of their images; at worst it takes as long as the second.

    Args:
      images: float16 or float32 [n, e], also mapped from a file; at least one.
      texts: likewise [m, e].
      pairs: (image, text) that belong together, int [p, 2], each once and in any order; a query
        without any ranks behind all candidates.
      mesh: devices that share each tile; every process passes the same arguments and gets the same,
        whole results.
      tile: images, and texts on each device, at a time; multiples of 128.
      progress: called after each tile.
    """
    grid = _Grid(images, texts, mesh, tile)
    image, text = np.asarray(pairs).T
    places = grid.places(image, text)
    tick = _counter(len(np.unique(places)) + grid.rows * grid.columns, progress)
    right = grid.pick(image, text, places, tick)
    best_of_image = np.full(len(images), -np.inf, np.float32)
    best_of_text = np.full(len(texts), -np.inf, np.float32)
    with np.errstate(invalid="ignore"):  # NaN is what comes of NaN
        np.maximum.at(best_of_image, image, right)
        np.maximum.at(best_of_text, text, right)
    of_images, of_texts = grid.count(best_of_image, best_of_text, tick)
    # Right ones have been counted too: the best itself, and its equals.
    of_images -= np.bincount(image[~(right < best_of_image[image])], minlength=len(images))
    of_texts -= np.bincount(text[~(right < best_of_text[text])], minlength=len(texts))
    return Ranks(of_images.astype(np.int32), of_texts.astype(np.int32))


def _counter(total: int, progress: Progress | None) -> Callable[[], None]:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return tick


class _Grid:
    """All tiles: `rows` blocks of images by `columns` blocks of texts, the latter split over the
    devices."""

    def __init__(self, images: np.ndarray, texts: np.ndarray, mesh: Mesh, tile: tuple[int, int]):
        self._images, self._texts = images, texts
        self._height = min(tile[0], _round_up(len(images)))
        self._width = min(tile[1], _round_up(-(-len(texts) // mesh.size))) * mesh.size
        self.rows = -(-len(images) // self._height)
        self.columns = -(-len(texts) // self._width)
        self._whole = NamedSharding(mesh, PartitionSpec())
        self._split = NamedSharding(mesh, EVERY_AXIS)
        self._programs = _programs(mesh)

    def places(self, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """Numbers of the tiles that pairs lie in, column by column."""
        return texts // self._width * self.rows + images // self._height

    def pick(
        self, images: np.ndarray, texts: np.ndarray, places: np.ndarray, tick: Callable[[], None]
    ) -> np.ndarray:
        """Scores of pairs in those tiles, float32 [p]."""
        found = np.empty(len(places), np.float32)
        order = np.argsort(places, kind="stable")
        tiles, starts = np.unique(places[order], return_index=True)
        at, block = -1, None
        for number, inside in zip(tiles.tolist(), np.split(order, starts[1:])):
            column, row = divmod(number, self.rows)
            if column != at:
                at, block = column, self._text_block(column)
            scores = self._programs.product(self._image_block(row), block)
            for start in range(0, len(inside), self._width):
                some = inside[start : start + self._width]
                cells = images[some] % self._height, texts[some] % self._width
                cells = [_pad(cell.astype(np.int32), self._width) for cell in cells]
                found[some] = _to_host(self._programs.pick(scores, *cells))[: len(some)]
            tick()
        return found

    def count(
        self, best_of_image: np.ndarray, best_of_text: np.ndarray, tick: Callable[[], None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """How many scores are not below the best right one: int64 of each image, of each text."""
        of_images = np.zeros(len(self._images), np.int64)
        of_texts = np.zeros(len(self._texts), np.int64)
        for column in range(self.columns):
            here = slice(column * self._width, (column + 1) * self._width)
            texts, best = self._text_block(column), _pad(best_of_text[here], self._width)
            sums = _put(np.zeros(self._width, np.int32), self._split)
            for row in range(self.rows):
                there = slice(row * self._height, (row + 1) * self._height)
                scores = self._programs.product(self._image_block(row), texts)
                counts, sums = self._programs.count(
                    scores,
                    _pad(best_of_image[there], self._height),
                    best,
                    sums,
                    len(best_of_image[there]),
                    len(best_of_text[here]),
                )
                of_images[there] += _to_host(counts)[: len(best_of_image[there])]
                tick()
            whole = _to_host(self._programs.gather(sums))
            of_texts[here] = whole[: len(best_of_text[here])]
        return of_images, of_texts

    def _image_block(self, row: int) -> jax.Array:
        block = self._images[row * self._height : (row + 1) * self._height]
        return _put(_pad(block, self._height), self._whole)

    def _text_block(self, column: int) -> jax.Array:
        block = self._texts[column * self._width : (column + 1) * self._width]
        return _put(_pad(block, self._width), self._split)


class _Programs(NamedTuple):
    """Jitted for a mesh; `product` alone makes scores, so that they are the same wherever used."""

    product: Callable[..., jax.Array]
    pick: Callable[..., jax.Array]
    count: Callable[..., tuple[jax.Array, jax.Array]]
    gather: Callable[[jax.Array], jax.Array]


@functools.cache
def _programs(mesh: Mesh) -> _Programs:
    def on_devices(function: Callable, in_specs: tuple, out_specs) -> Callable:
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs))

    whole, split, scores = PartitionSpec(), EVERY_AXIS, PartitionSpec(None, AXES)
    return _Programs(
        product=on_devices(_product, (whole, split), scores),
        pick=on_devices(_pick, (scores, whole, whole), whole),
        count=on_devices(_count, (scores, whole, split, split, whole, whole), (whole, split)),
        gather=jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, whole)),
    )


def _product(images: jax.Array, texts: jax.Array) -> jax.Array:
    images, texts = images.astype(jnp.float32), texts.astype(jnp.float32)
    return jnp.matmul(images, texts.T, precision=jax.lax.Precision.HIGHEST)


def _pick(scores: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Scores at (row, column) of the tile, each from the device that has it."""
    columns = columns - jax.lax.axis_index(AXES) * scores.shape[1]
    own = (columns >= 0) & (columns < scores.shape[1])
    return jax.lax.psum(jnp.where(own, scores[rows, jnp.where(own, columns, 0)], 0), AXES)


def _count(
    scores: jax.Array,
    best_of_image: jax.Array,
    best_of_text: jax.Array,
    of_texts: jax.Array,
    images: jax.Array,
    texts: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Scores that are not below the best right one.

    Args:
      scores: [h, w] of a device.
      best_of_image: [h].
      best_of_text: [w].
      of_texts: int32 [w], counted before.
      images, texts: how many of the tile's are there, the others being padding.

    Returns:
      Of each image, over all devices, int32 [h]; of each text, added to `of_texts`.
    """
    height, width = scores.shape
    is_text = jax.lax.axis_index(AXES) * width + jnp.arange(width) < texts
    is_image = jnp.arange(height) < images

    def add(of_texts, block):
        scores, best_of_image, is_image = block
        for_image = ~(scores < best_of_image[:, None]) & is_text
        for_text = ~(scores < best_of_text) & is_image[:, None]
        return of_texts + jnp.sum(for_text, axis=0), jnp.sum(for_image, axis=1)

    # Some rows at a time, so that each is read from memory once.
    blocks = [x.reshape(-1, _UNIT, *x.shape[1:]) for x in (scores, best_of_image, is_image)]
    of_texts, of_images = jax.lax.scan(add, of_texts, tuple(blocks))
    return jax.lax.psum(of_images.reshape(-1), AXES), of_texts


def _round_up(count: int) -> int:
    return -(-count // _UNIT) * _UNIT


def _pad(rows: np.ndarray, count: int) -> np.ndarray:
    """With zeros to `count` rows; the same array where nothing is missing."""
    if len(rows) == count:
        return rows
    return np.concatenate([rows, np.zeros((count - len(rows), *rows.shape[1:]), rows.dtype)])


def _put(rows: np.ndarray, place: NamedSharding) -> jax.Array:
    """What every process holds, on the devices."""
    return jax.make_array_from_callback(rows.shape, place, lambda index: rows[index])


def _to_host(array: jax.Array) -> np.ndarray:
    return np.asarray(array.addressable_data(0))
