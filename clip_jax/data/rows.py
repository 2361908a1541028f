"""The row of every position of a run, from sources, order, tokenizer and crop."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from clip_jax.configs import default
from clip_jax.data import images, mixture, order, teachers, text_mask, tokenizer
from clip_jax.data.crops import Crop
from clip_jax.data.loading import Row, Stages
from clip_jax.data.sources import captions, reading
from clip_jax.data.sources.base import Example, Source
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.errors import BadExample

# Tries at filling the place of an unusable example; with half of them unusable, all fail once
# in 10^15.
_REPLACEMENT_TRIES = 50


class RowStats(NamedTuple):
    """The outcome of loading one row.

    Attributes:
      usable: whether there is a row; False: neither its example nor any replacement can be used.
      skipped: the unusable example whose place another one has taken; None: there was none.
      truncated: number of its captions that were shortened to the context length.
    """

    usable: bool
    skipped: BadExample | None
    truncated: int


@dataclasses.dataclass(frozen=True)
class Positions:
    """The positions whose rows one part of a pipeline loads, in the order of loading.

    Position p (0, 1, 2, ... over the whole run, all hosts together) belongs to step
    p // batch_size.

    Attributes:
      start: the first position of the first step.
      batch_size: examples per step, over all hosts.
      rows: the rows of each global batch that this part loads.
      streams: number of interleaved streams of the order.
    """

    start: int
    batch_size: int
    rows: range
    streams: int

    def __getitem__(self, number: int) -> int:
        """The position of the row with this number, counted from 0 in this part."""
        step, row = divmod(number, len(self.rows))
        # Without streams, a batch is in the order of positions. With streams, the rows of each
        # stream stand together, so that one host has them.
        stream, place = divmod(self.rows[row], self.batch_size // self.streams)
        return self.start + step * self.batch_size + place * self.streams + stream


class Rows:
    """The row at each position of a run: a pure function of (seed, position).

    So any process that opens the same data gives the same rows.

    Attributes:
      stages: the stage that each thread is in.
    """

    def __init__(
        self,
        source: Source,
        order_: order.Order,
        tokenizer_: Tokenizer,
        config: ConfigDict,
        *,
        image_size: int,
        seed: int,
    ):
        """Reads nothing yet.

        Args:
          source: the examples.
          order_: their order.
          tokenizer_: encodes the captions.
          config: the fields of `data` in configs/default.py.
          image_size: pixels along a side.
          seed: PRNG seed of crops, captions, their masks and replacements, non-negative.
        """
        self.stages = Stages()
        self._source = source
        self._order = order_
        self._tokenizer = tokenizer_
        self._text_mask = text_mask.create(config.text_mask, tokenizer_)
        self._crop = Crop(config.crop, config.crop_scale, config.crop_ratio)
        self._image_size = image_size
        self._captions = config.captions
        self._weighted = default.has_pair_weights(config)
        self._embeds = teachers.stored_fields(config)
        self._seed = seed

    def empty(self) -> Row:
        """A row of zeros, for its shapes and dtypes."""
        captions = [np.zeros(self._tokenizer.context_length, np.int32)] * self._captions
        return {
            "image": np.zeros((self._image_size, self._image_size, 3), np.uint8),
            "tokens": _stacked(captions),
            **({"weight": np.float32(1)} if self._weighted else {}),
            **{name: np.zeros(width, np.float32) for name, width in self._embeds.items()},
        }

    def start(self, positions: Sequence[int]) -> list[Callable[[], tuple[Row | None, RowStats]]]:
        """Begins to read the examples at some positions, as `reading.start` does.

        Returns:
          For each, a function that waits for the example and makes its row: image uint8 [h, w, 3]
          and tokens int32 [l], or of several captions [c, l]; weight float32 [], where pairs have
          weights; and where the data keep embeddings by teachers, those, float32 [width], under
          the names of `teachers.field_names`. Where the example cannot be used, it is the row of
          another one; None: no other one can be used either.
        """
        indices = [self._order[position] for position in positions]
        reads = reading.start(self._source, indices)
        return [functools.partial(self._finish, *each) for each in zip(positions, indices, reads)]

    def keys(self, positions: Sequence[int], threads: int) -> list[str]:
        """Reads the keys of the examples at some positions, with threads as in `config.threads`."""
        indices = [self._order[position] for position in positions]
        return list(reading.by_threads(_read_key, self._source, indices, threads))

    def __getitem__(self, position: int) -> tuple[Row | None, RowStats]:
        """The row at one position, as by `start`."""
        return self.start([position])[0]()

    def _finish(
        self, position: int, index: int, read: Callable[[], Example]
    ) -> tuple[Row | None, RowStats]:
        rng = np.random.default_rng([self._seed, order.CROP, position])
        try:
            row, truncated = self._prepare(index, read, rng)
            return row, RowStats(True, None, truncated)
        except BadExample as bad:
            row, truncated = self._replacement(position)
            return row, RowStats(row is not None, bad, truncated)
        finally:
            self.stages.leave()

    def _replacement(self, position: int) -> tuple[Row | None, int]:
        rng = np.random.default_rng([self._seed, order.REPLACEMENT, position])
        for _ in range(_REPLACEMENT_TRIES):
            try:
                index = self._order[int(rng.integers(2**40))]
                return self._prepare(index, functools.partial(self._source.__getitem__, index), rng)
            except BadExample:  # is counted at its own position
                continue
        return None, 0

    def _prepare(
        self, index: int, read: Callable[[], Example], rng: np.random.Generator
    ) -> tuple[Row, int]:
        """Returns the row of an example, and the number of its captions that were shortened."""
        self.stages.enter("reading", f"example {index}")
        example = read()
        self.stages.enter("decoding", example.key)
        texts = captions.draw(example.captions, self._captions, rng)
        shorten = functools.partial(self._text_mask, rng) if self._text_mask else None
        tokens, truncated = zip(*(self._tokenizer.encode(text, shorten) for text in texts))
        if any(map(self._tokenizer.is_empty, tokens)):  # as after "&nbsp;"
            raise BadExample("empty caption", example.key)
        row: Row = {"tokens": _stacked(tokens)}
        row |= teachers.read(example, self._embeds)
        if self._weighted:
            others = example.groups[: len(example.groups) - len(self._embeds)]
            row["weight"] = _weight(others, example.key)
        row["image"] = images.pixels(example.image, example.key, self._image_size, self._crop, rng)
        return row, sum(truncated)


def _weight(values: Sequence[Any], key: str) -> np.float32:
    """Returns the weight of a pair; 1 where its source has none."""
    if not values:
        return np.float32(1)
    value = str(values[0])
    try:
        weight = np.float32(value)
    except ValueError:
        raise BadExample("unreadable weight" if value else "no weight", key, value[:80]) from None
    if not 0 <= weight < np.inf:
        raise BadExample("weight out of range", key, value)
    return weight


def _stacked(captions: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the ids of a single caption as they are, those of several as [c, l]."""
    return captions[0] if len(captions) == 1 else np.stack(captions)


def _read_key(read: Callable[[], Example]) -> str:
    try:
        return read().key
    except BadExample as bad:
        return bad.key


@dataclasses.dataclass(frozen=True)
class Spec:
    """A description of the rows of a run, by which any process can open them; can be pickled.

    Attributes:
      config: the fields of `data` in configs/default.py.
      tokenizer: name of the tokenizer, as `tokenizer.create` takes it.
      context_length: ids in a row.
      image_size: pixels along a side.
      seed: PRNG seed, non-negative.
      batch_size: examples per step, over all hosts.
      parts: number of parts that each batch is split into, one per host or process.
      fallback_dir: directory for indices of shards whose own cannot be written to.
    """

    config: ConfigDict
    tokenizer: str
    context_length: int
    image_size: int
    seed: int
    batch_size: int
    parts: int = 1
    fallback_dir: epath.Path | None = None

    def open(self) -> Rows:
        """Opens the data.

        Raises:
          UserError: the data are not there, or not in the expected form.
        """
        source, order_ = mixture.create(
            self.config,
            self.image_size,
            self.seed,
            batch_size=self.batch_size,
            parts=self.parts,
            fallback_dir=self.fallback_dir,
        )
        tokens = tokenizer.create(self.tokenizer, self.context_length)
        return self.bind(source, order_, tokens)

    def bind(self, source: Source, order_: order.Order, tokenizer_: Tokenizer) -> Rows:
        """The rows of data that are open already."""
        return Rows(
            source,
            order_,
            tokenizer_,
            self.config,
            image_size=self.image_size,
            seed=self.seed,
        )
