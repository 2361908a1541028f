"""A part of a source as the encoder reads it, with the reasons of unusable examples."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from clip_jax.data import crops, images
from clip_jax.data.sources import reading
from clip_jax.data.sources.base import Example, Source
from clip_jax.data.sources.captions import Captions
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.errors import BadExample
from clip_jax.models import Size


class Row(NamedTuple):
    """The fields of an example that a store keeps.

    Attributes:
      index: position in the source.
      key, captions, labels, groups: fields of the example.
    """

    index: int
    key: str
    captions: list[str]
    labels: list[int]
    groups: list[str]

    @property
    def caption(self) -> str:
        """The first caption; "": none."""
        return self.captions[0] if self.captions else ""


class Reader:
    """The examples first to stop of a source. Safe to use from several threads.

    An unusable example reads as a black image, and is missing from `rows`.

    Attributes:
      class_names, templates: those of the source.
      skipped: reason why an example is unusable, by position in the source.
    """

    def __init__(
        self,
        source: Source,
        first: int,
        stop: int,
        size: Size | None,
        tokenizer: Tokenizer | None,
    ):
        """Reads nothing yet.

        Args:
          source: the whole source.
          first, stop: range of positions in it.
          size: size of the model; None: images are not needed.
          tokenizer: the model's tokenizer; None: captions are not needed, and may be missing.
        """
        self.class_names, self.templates = source.class_names, source.templates
        self.skipped: dict[int, BadExample] = {}
        self._rows: dict[int, Row] = {}
        self._source, self._range = source, range(first, stop)
        self._size, self._tokenizer = size, tokenizer
        side = size.image_size if size else 1
        self._black = np.zeros((side, side, 3), np.uint8)

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: int) -> Example:
        """Reads the example at `index` of the range, its image decoded and cropped."""
        return self.start([index])[0]()

    def start(self, indices: Sequence[int]) -> list[Callable[[], Example]]:
        """Starts to read examples, as `reading.start` does."""
        positions = [self._range[index] for index in indices]
        started = zip(positions, reading.start(self._source, positions))
        return [functools.partial(self._example, position, read) for position, read in started]

    def _example(self, position: int, read: Callable[[], Example]) -> Example:
        try:
            example = read()
            pixels = self._check(example)
        except BadExample as bad:
            self.skipped[position] = bad
            return Example(self._black, Captions((), ()), (), bad.key)
        self._rows[position] = Row(
            index=position,
            key=example.key,
            captions=list(example.captions.texts),
            labels=list(example.labels),
            groups=list(map(str, example.groups)),
        )
        return dataclasses.replace(example, image=pixels)

    def read_all(self, threads: int) -> Iterator[int]:
        """Reads every example and yields their numbers; `threads` 0: one per CPU core."""
        done = reading.by_threads(lambda read: read(), self, range(len(self)), threads)
        for number, _ in enumerate(done):
            yield number

    @property
    def rows(self) -> list[Row]:
        """The usable examples that have been read, in the order of the source."""
        return [self._rows[position] for position in sorted(self._rows)]

    @property
    def indices(self) -> Int64[np.ndarray, " rows"]:
        """The positions of `rows` in the range."""
        return np.array(sorted(self._rows), np.int64) - self._range.start

    def _check(self, example: Example) -> UInt8[np.ndarray, "h w 3"]:
        """Returns the model's pixels; BadExample where image or caption is unusable."""
        if self._tokenizer is not None:
            tokens, _ = self._tokenizer.encode(example.text)
            if self._tokenizer.is_empty(tokens):  # as after "&nbsp;"
                raise BadExample("empty caption", example.key)
        if self._size is None:
            return self._black
        side = self._size.image_size
        crop = crops.Crop(self._size.image_crop, filter=self._size.image_filter)
        return images.pixels(example.image, example.key, side, crop, None)
