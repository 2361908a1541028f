"""What images are compared by: perceptual hashes with colours, or embeddings."""

import functools
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from clip_jax.curation import parallel
from clip_jax.curation.dedup_search import SIGNATURE
from clip_jax.data import arguments, images
from clip_jax.data.crops import CENTER
from clip_jax.data.sources import reading
from clip_jax.errors import BadExample, UserError
from clip_jax.storage import locations, ranges

if TYPE_CHECKING:
    from clip_jax.data.sources.base import Example, Source

_FIELDS = 3  # along a side, of each of which the mean colour is kept


class Features(NamedTuple):
    """The images of a source that can be used.

    Attributes:
      indices: int64 [n], in the source.
      keys: n strings.
      values: [n, ...], what they are compared by.
      unusable: the other images, by reason.
    """

    indices: np.ndarray
    keys: pa.ChunkedArray
    values: np.ndarray
    unusable: Counter[str]


class _Part(NamedTuple):
    """As `Features`, of some examples."""

    indices: list[int]
    keys: list[str]
    values: list[np.ndarray]
    unusable: Counter[str]


def signatures(source: "Source", data: arguments.Data, workers: int) -> Features:
    """`SIGNATURE` [n] of the images of a source."""
    return _collect(functools.partial(_examine, signature), source, data, workers, SIGNATURE, ())


def from_model(source: "Source", data: arguments.Data, workers: int, checkpoint: str) -> Features:
    """float32 [n, d], embeddings by the model of a checkpoint, mapped from a temporary file."""
    from clip_jax import api

    model = api.load(checkpoint)
    size, width = model.net.size.image_size, model.net.size.embed_dim
    work = functools.partial(_examine, functools.partial(_pixels, size))
    return _collect(work, source, data, workers, np.dtype(np.float32), (width,), model.encode_image)


def from_file(source: "Source", data: arguments.Data, workers: int, path: str) -> Features:
    """Rows of a .npy file, one per example of the source in its order; the images are not decoded.

    Raises:
      UserError: the file is not such an array.
    """
    place = locations.parse(path)
    stat = locations.stat(place)
    if stat is None:
        raise UserError(f"There is no file {path} of embeddings.")
    copy = ranges.local_copy(place, stat)
    try:
        rows = np.load(copy, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"The embeddings {path} cannot be read: {error}.") from error
    if rows.ndim != 2 or len(rows) != len(source):
        raise UserError(
            f"The embeddings {path} have the shape {rows.shape}; wanted is a row for each of "
            f"{len(source):,} examples."
        )
    work = functools.partial(_examine, _nothing)
    found = _collect(work, source, data, workers, np.dtype(np.uint8), ())
    every = len(found.indices) == len(rows)
    return found._replace(values=rows if every else rows[found.indices])


def signature(example: "Example") -> np.ndarray:
    """`SIGNATURE` [] of an image; BadExample where it cannot be decoded."""
    import imagehash

    image = decode(example)
    made = np.zeros((), SIGNATURE)
    made["hash"] = np.packbits(imagehash.phash(image).hash).view("<u8")[0]
    means = image.resize((_FIELDS, _FIELDS), Image.Resampling.BOX)
    made["colours"] = np.asarray(means).reshape(-1)
    return made


def decode(example: "Example") -> Image.Image:
    """The image, upright and RGB; BadExample where it cannot be decoded."""
    if isinstance(example.image, bytes):
        return images.decode(example.image, example.key)
    return Image.fromarray(example.image)


def _pixels(size: int, example: "Example") -> np.ndarray:
    return images.pixels(example.image, example.key, size, CENTER, None)


def _nothing(example: "Example") -> np.ndarray:
    del example
    return np.zeros((), np.uint8)


def _examine(look, source: "Source", part: Sequence[int]) -> _Part:
    found = _Part([], [], [], Counter())
    for index, read in zip(part, reading.in_turn(source, part)):
        try:
            example = read()
            found.values.append(look(example))
        except BadExample as bad:
            found.unusable[bad.reason] += 1
        else:
            found.indices.append(int(index))
            found.keys.append(example.key)
    return found


def _collect(
    work: "parallel.Work[_Part]",
    source: "Source",
    data: arguments.Data,
    workers: int,
    dtype: np.dtype,
    shape: tuple[int, ...],
    finish=np.asarray,
) -> Features:
    """The features of a whole source; `finish` makes values, [k, *shape], of those of a part."""
    todo = parallel.parts(range(len(source)))
    with tempfile.TemporaryFile() as file:  # goes with the process
        values = np.memmap(file, dtype, shape=(max(len(source), 1), *shape))
    indices, keys, count = [np.empty(0, np.int64)], [], 0
    unusable: Counter[str] = Counter()
    for part in parallel.map_parts(work, source, data, todo, workers, "reading"):
        if part.values:
            values[count : count + len(part.values)] = finish(np.stack(part.values))
        count += len(part.values)
        indices.append(np.array(part.indices, np.int64))
        keys.append(pa.array(part.keys, pa.large_string()))
        unusable += part.unusable
    return Features(
        np.concatenate(indices), pa.chunked_array(keys, pa.large_string()), values[:count], unusable
    )
