"""Examples, and the interface of the sources that they are read from."""

import dataclasses
import re
from typing import Any, Protocol, runtime_checkable

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from clip_jax.data.sources.captions import Captions

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
# Characters that a key is written without: ends of lines, control characters, halves of surrogate
# pairs (which stand for bytes that are not UTF-8), and the backslash, which escapes the others.
_ESCAPED = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\\]")


@dataclasses.dataclass(frozen=True)
class Example:
    """One image-text pair as stored.

    Attributes:
      image: an encoded file, or uint8 [h, w, 3].
      captions: all captions and their weights in training; empty where the set has none.
      labels: class indices, each once; empty where it has no class, or none of those that count.
      key: unique name of the example, as `as_key` makes it, so that lists have a key a line.
      groups: values of the source's `group_keys`, "" where there is none, for bias probes; in
        training those of its `weight_key` and `teacher_keys`. A text, or a list as stored.
    """

    image: bytes | np.ndarray
    captions: Captions
    labels: tuple[int, ...]
    key: str
    groups: tuple[Any, ...] = ()

    @property
    def text(self) -> str:
        """The first caption, which evaluation takes; "" where there is none."""
        return self.captions.texts[0] if self.captions.texts else ""

    @property
    def label(self) -> int:
        """The first class, for sets with one per example; -1: none."""
        return self.labels[0] if self.labels else -1


@runtime_checkable  # so that annotations can be checked under test
class Source(Protocol):
    """Random access to examples; called from many threads at once.

    A source that gains from many concurrent reads also has a method `start`; see `reading.start`.
    One that reads files has a method `listing`: a line for each of them, in order, with its name
    wherever it lies, a tab and what tells it from another, such as size and count.

    Attributes:
      class_names: names of the classes, by label; empty where there are no classes or only numbers.
      templates: prompt templates that suit the set, such as "a photo of a {}."; may be empty.
    """

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def templates(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Returns the example stored at `index`, the same at every call; may raise BadExample."""
        ...


@dataclasses.dataclass(frozen=True)
class Request:
    """The description of a source that is to be opened.

    Attributes:
      spec: the fields of `source()` in configs/default.py.
      image_size: pixels along a side, for sources that draw their images.
      seed: PRNG seed of sources that draw their images.
      fallback_dir: directory for indices of shards whose own cannot be written to.
      chunk: number of stored neighbours that are read at once.
      cached_chunks: number of chunks held in memory; 0: every example is read by itself.
    """

    spec: ConfigDict
    image_size: int
    seed: int
    fallback_dir: epath.Path | None = None
    chunk: int = 1
    cached_chunks: int = 0


def as_key(name: str) -> str:
    """Returns the name of a file as one line of UTF-8, escaped as in Python; one-to-one."""
    return _ESCAPED.sub(lambda match: match[0].encode("unicode_escape").decode(), name)


def from_key(key: str) -> str:
    """Returns the name of which `as_key` made a key."""
    return key.encode("latin-1", "backslashreplace").decode("unicode_escape")
