"""Sources: random access to stored examples, whatever they are stored in."""

import collections
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any, Protocol, TypeVar

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from clip_jax.data.captions import Captions
from clip_jax.errors import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")


@dataclasses.dataclass(frozen=True)
class Example:
    """One image-text pair as stored.

    Attributes:
      image: an encoded file, or uint8 [h, w, 3].
      captions: all of them, and how often training draws each; none where the set has none.
      labels: class indices, each once; none where it has no class, or none of those that count.
      key: names the example in messages.
      groups: what the source's `group_keys` hold, "" where there is nothing; for bias probes.
    """

    image: bytes | np.ndarray
    captions: Captions
    labels: tuple[int, ...]
    key: str
    groups: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The first caption, which evaluation takes; "" where there is none."""
        return self.captions.texts[0] if self.captions.texts else ""

    @property
    def label(self) -> int:
        """The first class, for sets with one per example; -1: none."""
        return self.labels[0] if self.labels else -1


class Source(Protocol):
    """Random access to examples; called from many threads at once.

    One that reads from where many reads at once are worth it has a method `start` too, as `start`
    below.

    Attributes:
      class_names: by label; empty where the set has no classes, or only their numbers.
      templates: prompt templates natural to the set, such as "a photo of a {}."; may be empty.
    """

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def templates(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """The example stored at `index`, the same at every call; may raise BadExample."""
        ...


def start(source: Any, indices: Sequence[int]) -> list[Callable[[], Any]]:
    """Begins to read examples that are wanted soon.

    From a bucket they come beside each other, neighbours in one piece; others are read when their
    function is called.

    Args:
      source: a source, or another collection with such a method, as records have.
      indices: positions in the source.

    Returns:
      For each, a function that waits for it; it returns and raises what `source[index]` would.
    """
    own = getattr(source, "start", None)
    return own(indices) if own else [functools.partial(source.__getitem__, i) for i in indices]


_AHEAD = 128  # examples that `in_turn` has under way
_TOGETHER = 256  # that `by_threads` has

Result = TypeVar("Result")


def by_threads(
    work: Callable[[Callable[[], Any]], Result],
    source: Any,
    indices: Sequence[int],
    threads: int,
) -> Iterator[Result]:
    """Yields the results of `work` for many examples, in order.

    Args:
      work: called with each function that `start` returns.
      source: see `start`.
      indices: positions in the source.
      threads: number of threads; 0: one per CPU core.
    """
    with futures.ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        for first in range(0, len(indices), _TOGETHER):
            yield from pool.map(work, start(source, indices[first : first + _TOGETHER]))


def in_turn(source: Any, indices: Iterable[int]) -> Iterator[Callable[[], Any]]:
    """Yields the functions of `start` for many examples, those of the next few begun.

    Arguments as of `start`.
    """
    upcoming, remaining = collections.deque[Callable[[], Any]](), iter(indices)
    while True:
        if len(upcoming) <= _AHEAD // 2:
            upcoming += start(source, list(itertools.islice(remaining, _AHEAD // 2)))
        if not upcoming:
            return
        yield upcoming.popleft()


def create(
    spec: ConfigDict,
    image_size: int,
    seed: int,
    *,
    spare: epath.Path | None = None,
    run: int = 1,
    kept_runs: int = 0,
) -> Source:
    """The source that `spec` names.

    Args:
      spec: the fields of `source()` in configs/default.py.
      image_size: pixels along a side, for sources that draw their images.
      seed: of sources that draw their images.
      spare: directory for indices of shards whose own cannot be written to.
      run: neighbours in a tar shard that are read at once.
      kept_runs: of these, how many are held in memory; 0: every example is read by itself.

    Raises:
      UserError: the data is not there or not in the expected form.
    """
    if spec.type == "digits":
        from clip_jax.data.digits import DigitScenes

        return DigitScenes(spec.split, image_size, seed)
    if spec.type == "folder":
        from clip_jax.data.folder import ImageFolder

        return ImageFolder(spec.path, spec.text_key, spec.label_key, spec.group_keys)
    if spec.type == "tar":
        from clip_jax.data.tar import TarShards

        keys = spec.text_key, spec.label_key, spec.group_keys
        return TarShards(spec.path, *keys, spare=spare, run=run, kept_runs=kept_runs)
    if spec.type == "tfds":
        from clip_jax.data.tfds_source import TfdsSource

        return TfdsSource(spec, spare)
    if spec.type == "tfrecord":
        from clip_jax.data.tfrecord_source import TfRecordSource

        return TfRecordSource(spec, spare)
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
