"""Part of a source as the encoder reads it; what cannot be used is noted with its reason."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from clip_jax.data import crops, images
from clip_jax.data.sources import reading
from clip_jax.data.sources.base import Example, Source
from clip_jax.data.sources.captions import Captions
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.errors import BadExample
from clip_jax.models import Size


class Row(NamedTuple):
    """What a store keeps of an example; `index` is its place in the source, the rest its own."""

    index: int
    key: str
    captions: list[str]
    labels: list[int]
    groups: list[str]

    @property
    def caption(self) -> str:
        """The first one; "": it has none."""
        return self.captions[0] if self.captions else ""


class Reader:
    """The examples first to stop of a source. Safe to use from several threads.

    In the place of one that cannot be used it gives a black image, and leaves it out of `rows`.

    Attributes:
      class_names, templates: of the source.
      skipped: by place in the source, why an example cannot be used.
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
          source: of the examples.
          first, stop: a range of it.
          size: of the model; None: images are not needed.
          tokenizer: None: captions are not needed, and may be missing.
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
        """The example at `index` of the range, its image decoded and cropped."""
        return self.start([index])[0]()

    def start(self, indices: Sequence[int]) -> list[Callable[[], Example]]:
        """Begins to read examples, as `reading.start` does."""
        places = [self._range[index] for index in indices]
        begun = zip(places, reading.start(self._source, places))
        return [functools.partial(self._example, place, read) for place, read in begun]

    def _example(self, place: int, read: Callable[[], Example]) -> Example:
        try:
            example = read()
            pixels = self._check(example)
        except BadExample as bad:
            self.skipped[place] = bad
            return Example(self._black, Captions((), ()), (), bad.key)
        self._rows[place] = Row(
            index=place,
            key=example.key,
            captions=list(example.captions.texts),
            labels=list(example.labels),
            groups=list(example.groups),
        )
        return dataclasses.replace(example, image=pixels)

    def read_all(self, threads: int) -> Iterator[int]:
        """Reads every example; yields their numbers. `threads`: 0: one per CPU core."""
        done = reading.by_threads(lambda read: read(), self, range(len(self)), threads)
        for number, _ in enumerate(done):
            yield number

    @property
    def rows(self) -> list[Row]:
        """The usable examples that have been read, in the order of the source."""
        return [self._rows[place] for place in sorted(self._rows)]

    @property
    def numbers(self) -> np.ndarray:
        """Where in the range those stand, int64 [n]."""
        return np.array(sorted(self._rows), np.int64) - self._range.start

    def _check(self, example: Example) -> np.ndarray:
        """The pixels that the model takes; BadExample where image or caption is unusable."""
        if self._tokenizer is not None:
            tokens, _ = self._tokenizer.encode(example.text)
            if self._tokenizer.is_empty(tokens):  # as after "&nbsp;"
                raise BadExample("empty caption", example.key)
        if self._size is None:
            return self._black
        side, crop = self._size.image_size, crops.Crop(self._size.image_crop)
        return images.pixels(example.image, example.key, side, crop, None)
