"""The features by which images are compared: perceptual hashes with colours, or embeddings."""

import functools
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from clip_jax.curation import parallel
from clip_jax.curation.check import decode
from clip_jax.curation.dedup_search import SIGNATURE
from clip_jax.data import arguments, images
from clip_jax.data.crops import CENTER
from clip_jax.data.sources import reading
from clip_jax.data.sources.base import Example, Source
from clip_jax.errors import BadExample, UserError
from clip_jax.storage import locations, ranges

_FIELDS = 3  # along a side, each with its mean colour


class Features(NamedTuple):
    """The features of the usable images of a source.

    Attributes:
      indices: int64 [n], positions in the source.
      keys: n strings.
      values: [n, ...], the features.
      unusable: number of the other images, by reason.
    """

    indices: np.ndarray
    keys: pa.ChunkedArray
    values: np.ndarray
    unusable: Counter[str]


class _Part(NamedTuple):
    """The features of some examples; see `Features`."""

    indices: list[int]
    keys: list[str]
    values: list[np.ndarray]
    unusable: Counter[str]


def signatures(source: Source, data: arguments.Data, workers: int) -> Features:
    """Computes `SIGNATURE` [n] of the images of a source."""
    return _collect(signature, source, data, workers, SIGNATURE, ())


def from_model(source: Source, data: arguments.Data, workers: int, checkpoint: str) -> Features:
    """Embeds the images by the model of a checkpoint: float32 [n, d], in a temporary file."""
    from clip_jax import api  # with JAX

    model = api.load(checkpoint)
    size, width = model.net.size.image_size, model.net.size.embed_dim
    extract = functools.partial(_pixels, size)
    dtype = np.dtype(np.float32)
    return _collect(extract, source, data, workers, dtype, (width,), model.encode_image)


def from_file(source: Source, data: arguments.Data, workers: int, path: str) -> Features:
    """Reads a .npy file with a row per example of the source; the images are not decoded.

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
            f"The embeddings {path} have the shape {rows.shape}; they need a row for each of "
            f"{len(source):,} examples."
        )
    found = _collect(_nothing, source, data, workers, np.dtype(np.uint8), ())
    every = len(found.indices) == len(rows)
    return found._replace(values=rows if every else rows[found.indices])


def signature(example: Example) -> np.ndarray:
    """Computes `SIGNATURE` [] of an image; raises BadExample where it cannot be decoded."""
    import imagehash  # with SciPy

    image = decode(example)
    made = np.zeros((), SIGNATURE)
    made["hash"] = np.packbits(imagehash.phash(image).hash).view("<u8")[0]
    means = image.resize((_FIELDS, _FIELDS), Image.Resampling.BOX)
    made["colours"] = np.asarray(means).reshape(-1)
    return made


def _pixels(size: int, example: Example) -> np.ndarray:
    return images.pixels(example.image, example.key, size, CENTER, None)


def _nothing(example: Example) -> np.ndarray:
    del example
    return np.zeros((), np.uint8)


def _extract(
    extract: Callable[[Example], np.ndarray], source: Source, part: Sequence[int]
) -> _Part:
    found = _Part([], [], [], Counter())
    for index, read in zip(part, reading.in_order(source, part)):
        try:
            example = read()
            found.values.append(extract(example))
        except BadExample as bad:
            found.unusable[bad.reason] += 1
        else:
            found.indices.append(int(index))
            found.keys.append(example.key)
    return found


def _collect(
    extract: Callable[[Example], np.ndarray],
    source: Source,
    data: arguments.Data,
    workers: int,
    dtype: np.dtype,
    shape: tuple[int, ...],
    finish: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> Features:
    """Extracts the features of a whole source.

    Args:
      extract: returns the features of an example, or what `finish` makes them from.
      source: the examples.
      data: description of the source, for other processes.
      workers: number of processes.
      dtype: dtype of the features.
      shape: shape of the features of one example.
      finish: makes the features, [k, *shape], of the stacked results of `extract`.
    """
    work = functools.partial(_extract, extract)
    todo = parallel.parts(range(len(source)))
    with tempfile.TemporaryFile() as file:  # is deleted when the process ends
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
