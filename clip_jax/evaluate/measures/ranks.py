"""Exact ranks between many images and many texts, one tile of similarities at a time.

Every tile is a product computed once that serves both directions: its rows are images that look
for texts, its columns texts that look for images. An earlier pass over the tiles that hold right
pairs reads the scores of these. Both passes run the same compiled product on the same rows, so a
score is the same number in both, and equal embeddings tie exactly.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int32, Int64, Integer, Shaped

from clip_jax.sharding import AXES, EVERY_AXIS, to_host

# Images, and texts on each device, of a tile: 16 MiB of scores. Multiples of `_UNIT`.
TILE = (1024, 4096)
_UNIT = 128

Progress = Callable[[int, int], None]  # tiles done, tiles in all


class Ranks(NamedTuple):
    """The number of wrong candidates before the best right one of each query; 0: it is first.

    Attributes:
      image_to_text: ranks of the images as queries.
      text_to_image: ranks of the texts as queries.
    """

    image_to_text: Int32[np.ndarray, " images"]
    text_to_image: Int32[np.ndarray, " texts"]


def match_ranks(
    images: Float[np.ndarray, "images embed"],
    texts: Float[np.ndarray, "texts embed"],
    pairs: Integer[np.ndarray, "pairs 2"],
    mesh: Mesh,
    *,
    tile: tuple[int, int] = TILE,
    progress: Progress | None = None,
) -> Ranks:
    """Computes the ranks in both directions. Ties and NaN count against the model.

    Similarities are products in float32. Memory beyond the arguments: a few tiles, and a few
    numbers per image, text and pair. The first pass is short where right pairs lie together, as
    with texts in the order of their images; at worst it takes as long as the second.

    Args:
      images: embeddings, float16 or float32, at least one; may be mapped from a file.
      texts: embeddings of the same kind.
      pairs: right pairs (image, text), each once and in any order; a query without any ranks behind
        all candidates.
      mesh: devices that share each tile; every process passes the same arguments and gets the same,
        whole results.
      tile: images, and texts on each device, at a time; multiples of 128.
      progress: called after each tile.
    """
    grid = _Grid(images, texts, mesh, tile)
    image, text = np.asarray(pairs).T
    tiles = grid.tile_ids(image, text)
    tick = _counter(len(np.unique(tiles)) + grid.rows * grid.columns, progress)
    right = grid.pick(image, text, tiles, tick)
    best_of_image = np.full(len(images), -np.inf, np.float32)
    best_of_text = np.full(len(texts), -np.inf, np.float32)
    with np.errstate(invalid="ignore"):  # NaN stays NaN
        np.maximum.at(best_of_image, image, right)
        np.maximum.at(best_of_text, text, right)
    of_images, of_texts = grid.count(best_of_image, best_of_text, tick)
    # The count includes right candidates: the best itself, and its equals.
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
    """The tiles: `rows` blocks of images by `columns` blocks of texts, split over the devices."""

    def __init__(
        self,
        images: Float[np.ndarray, "images embed"],
        texts: Float[np.ndarray, "texts embed"],
        mesh: Mesh,
        tile: tuple[int, int],
    ):
        self._images, self._texts = images, texts
        self._height = min(tile[0], _round_up(len(images)))
        self._width = min(tile[1], _round_up(-(-len(texts) // mesh.size))) * mesh.size
        self.rows = -(-len(images) // self._height)
        self.columns = -(-len(texts) // self._width)
        self._whole = NamedSharding(mesh, PartitionSpec())
        self._split = NamedSharding(mesh, EVERY_AXIS)
        self._programs = _programs(mesh)

    def tile_ids(
        self, images: Integer[np.ndarray, " pairs"], texts: Integer[np.ndarray, " pairs"]
    ) -> Integer[np.ndarray, " pairs"]:
        """Numbers the tiles that pairs lie in, column by column."""
        return texts // self._width * self.rows + images // self._height

    def pick(
        self,
        images: Integer[np.ndarray, " pairs"],
        texts: Integer[np.ndarray, " pairs"],
        tile_ids: Integer[np.ndarray, " pairs"],
        tick: Callable[[], None],
    ) -> Float32[np.ndarray, " pairs"]:
        """Reads the scores of pairs from their tiles."""
        found = np.empty(len(tile_ids), np.float32)
        order = np.argsort(tile_ids, kind="stable")
        tiles, starts = np.unique(tile_ids[order], return_index=True)
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
                found[some] = to_host(self._programs.pick(scores, *cells))[: len(some)]
            tick()
        return found

    def count(
        self,
        best_of_image: Float32[np.ndarray, " images"],
        best_of_text: Float32[np.ndarray, " texts"],
        tick: Callable[[], None],
    ) -> tuple[Int64[np.ndarray, " images"], Int64[np.ndarray, " texts"]]:
        """Counts the scores of each image and of each text not below its best right one."""
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
                of_images[there] += to_host(counts)[: len(best_of_image[there])]
                tick()
            whole = to_host(self._programs.gather(sums))
            of_texts[here] = whole[: len(best_of_text[here])]
        return of_images, of_texts

    def _image_block(self, row: int) -> jax.Array:
        block = self._images[row * self._height : (row + 1) * self._height]
        return _put(_pad(block, self._height), self._whole)

    def _text_block(self, column: int) -> jax.Array:
        block = self._texts[column * self._width : (column + 1) * self._width]
        return _put(_pad(block, self._width), self._split)


class _Programs(NamedTuple):
    """The compiled programs of a mesh.

    Only `product` computes scores, for a score to be the same number wherever it is used.
    """

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


def _product(
    images: Float[Array, "h embed"], texts: Float[Array, "w embed"]
) -> Float32[Array, "h w"]:
    images, texts = images.astype(jnp.float32), texts.astype(jnp.float32)
    return jnp.matmul(images, texts.T, precision=jax.lax.Precision.HIGHEST)


def _pick(
    scores: Float32[Array, "h w"], rows: Int32[Array, " cells"], columns: Int32[Array, " cells"]
) -> Float32[Array, " cells"]:
    """Reads scores at (row, column) of the tile, each from the device that has it."""
    columns = columns - jax.lax.axis_index(AXES) * scores.shape[1]
    own = (columns >= 0) & (columns < scores.shape[1])
    return jax.lax.psum(jnp.where(own, scores[rows, jnp.where(own, columns, 0)], 0), AXES)


def _count(
    scores: Float32[Array, "h w"],
    best_of_image: Float32[Array, " h"],
    best_of_text: Float32[Array, " w"],
    of_texts: Int32[Array, " w"],
    images: Integer[Array, ""],
    texts: Integer[Array, ""],
) -> tuple[Int32[Array, " h"], Int32[Array, " w"]]:
    """Counts the scores that are not below the best right one.

    Args:
      scores: tile of one device.
      best_of_image: best right score of each image.
      best_of_text: best right score of each text.
      of_texts: counts of the texts so far.
      images, texts: numbers of images and texts in the tile, the others being padding.

    Returns:
      The counts of the images, over all devices, and of the texts, added to `of_texts`.
    """
    height, width = scores.shape
    is_text = jax.lax.axis_index(AXES) * width + jnp.arange(width) < texts
    is_image = jnp.arange(height) < images

    def add(of_texts, block):
        scores, best_of_image, is_image = block
        for_image = ~(scores < best_of_image[:, None]) & is_text
        for_text = ~(scores < best_of_text) & is_image[:, None]
        return of_texts + jnp.sum(for_text, axis=0), jnp.sum(for_image, axis=1)

    # Some rows at a time: each is read from memory once for both directions.
    blocks = [x.reshape(-1, _UNIT, *x.shape[1:]) for x in (scores, best_of_image, is_image)]
    of_texts, of_images = jax.lax.scan(add, of_texts, tuple(blocks))
    return jax.lax.psum(of_images.reshape(-1), AXES), of_texts


def _round_up(count: int) -> int:
    return -(-count // _UNIT) * _UNIT


def _pad(rows: Shaped[np.ndarray, " n *d"], count: int) -> Shaped[np.ndarray, " {count} *d"]:
    """Pads with zeros to `count` rows."""
    if len(rows) == count:
        return rows
    return np.concatenate([rows, np.zeros((count - len(rows), *rows.shape[1:]), rows.dtype)])


def _put(rows: Shaped[np.ndarray, "*shape"], split: NamedSharding) -> Shaped[Array, "*shape"]:
    """Moves rows that every process holds onto the devices."""
    return jax.make_array_from_callback(rows.shape, split, lambda index: rows[index])
