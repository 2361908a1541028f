"""Opens the source that a config names."""

import math

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from clip_jax.data.sources.base import Example, Source
from clip_jax.data.sources.captions import Captions
from clip_jax.data.sources.digits import DigitScenes
from clip_jax.data.sources.folder import ImageFolder
from clip_jax.data.sources.tar import TarShards
from clip_jax.errors import UserError


def create(
    spec: ConfigDict,
    image_size: int,
    seed: int,
    *,
    fallback_dir: epath.Path | None = None,
    chunk: int = 1,
    cached_chunks: int = 0,
) -> Source:
    """Opens a source.

    Args:
      spec: the fields of `source()` in configs/default.py.
      image_size: pixels along a side, for sources that draw their images.
      seed: PRNG seed of sources that draw their images.
      fallback_dir: directory for indices of shards whose own cannot be written to.
      chunk: number of neighbours in a tar shard that are read at once.
      cached_chunks: number of chunks held in memory; 0: every example is read by itself.

    Raises:
      UserError: the data are not there or not in the expected form.
    """
    if spec.type == "digits":
        return DigitScenes(spec.split, image_size, seed)
    if spec.type == "folder":
        return ImageFolder(
            spec.path,
            spec.text_key,
            spec.label_key,
            spec.group_keys,
            image_key=spec.image_key,
            chunk=chunk,
            cached_chunks=cached_chunks,
        )
    if spec.type == "tar":
        return TarShards(
            spec.path,
            spec.text_key,
            spec.label_key,
            spec.group_keys,
            fallback_dir=fallback_dir,
            chunk=chunk,
            cached_chunks=cached_chunks,
        )
    # These two alone need TensorFlow, which takes seconds to load.
    if spec.type == "tfds":
        from clip_jax.data.sources.tfds import TfdsSource

        return TfdsSource(spec, fallback_dir)
    if spec.type == "tfrecord":
        from clip_jax.data.sources.tfrecord_source import TfRecordSource

        return TfRecordSource(spec, fallback_dir)
    if spec.type == "synthetic":
        return Synthetic(spec.size, image_size, seed)
    raise UserError(
        f"The config names no data it can read: source.type is {spec.type!r}, and must be one of "
        '"digits", "folder", "tar", "tfds", "tfrecord", "synthetic". To try it with the embedded '
        "set, add --config.data.source.type=digits --config.data.source.split=train to the command."
    )


_WORDS = ("a", "the", "red", "small", "old", "dog", "cat", "house", "tree", "on", "under", "near")

_SHIFTS = 2**20  # images that synthetic noise is cut into


class Synthetic:
    """Noise with random captions, for benchmarks: nothing to read or decode."""

    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def __init__(self, size: int, image_size: int, seed: int):
        if size < 1:
            raise UserError(f"A synthetic source needs source.size of at least 1, not {size}.")
        self._size = size
        self._shape = (image_size, image_size, 3)
        self._seed = seed
        # To draw the bytes of each image anew would hold up the other threads.
        noise = np.random.default_rng(seed).bytes(math.prod(self._shape) + _SHIFTS)
        self._noise = np.frombuffer(noise, np.uint8)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng([self._seed, index])
        start = rng.integers(_SHIFTS)
        image = self._noise[start : start + math.prod(self._shape)].reshape(self._shape)
        text = " ".join(rng.choice(_WORDS, size=rng.integers(4, 17)))
        return Example(image, Captions((text,), (1.0,)), labels=(), key=f"synthetic {index}")
