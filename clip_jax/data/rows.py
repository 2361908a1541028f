"""The row of every position of a run, from sources, order, tokenizer and crop."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from clip_jax.data import images, mixture, order, tokenizer
from clip_jax.data.crops import Crop
from clip_jax.data.sources import captions, reading
from clip_jax.data.sources.base import Example, Source
from clip_jax.data.stages import Stages
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.errors import BadExample

Row = dict[str, Any]  # image uint8 [h, w, 3] and tokens int32 [l]

# Tries at filling the place of an unusable example; with half of them unusable, all fail once
# in 10^15.
_REPLACEMENT_TRIES = 50


class Note(NamedTuple):
    """What there is to say of a row.

    Attributes:
      bad: the example whose place it has, if that one cannot be used.
      truncated: its caption was cut to the context length.
    """

    bad: BadExample | None
    truncated: bool


class Rows:
    """The row at position p (0, 1, 2, ... over the whole run): a pure function of (seed, p).

    So any process that opens the same data gives the same rows.

    Attributes:
      stages: what each thread is doing.
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
        """Reads nothing yet; arguments as of `pipeline.TrainPipeline`."""
        self.stages = Stages()
        self._source = source
        self._order = order_
        self._tokenizer = tokenizer_
        self._crop = Crop(config.crop, config.crop_scale, config.crop_ratio)
        self._image_size = image_size
        self._seed = seed

    def empty(self) -> Row:
        """A row of zeros, for its shapes and dtypes."""
        return {
            "image": np.zeros((self._image_size, self._image_size, 3), np.uint8),
            "tokens": np.zeros(self._tokenizer.context_length, np.int32),
        }

    def start(self, positions: Sequence[int]) -> list[Callable[[], tuple[Row | None, Note]]]:
        """Begins to read the examples at some positions, as `reading.start` does.

        Returns:
          For each, a function that waits for the example and makes its row: another example's
          where that one cannot be used; None: nor can any.
        """
        indices = [self._order[position] for position in positions]
        reads = reading.start(self._source, indices)
        return [functools.partial(self._finish, *each) for each in zip(positions, indices, reads)]

    def __getitem__(self, position: int) -> tuple[Row | None, Note]:
        """The row at one position, as by `start`."""
        return self.start([position])[0]()

    def _finish(
        self, position: int, index: int, read: Callable[[], Example]
    ) -> tuple[Row | None, Note]:
        rng = np.random.default_rng([self._seed, order.CROP, position])
        try:
            row, truncated = self._prepare(index, read, rng)
            return row, Note(None, truncated)
        except BadExample as bad:
            row, truncated = self._replacement(position)
            return row, Note(bad, truncated)
        finally:
            self.stages.leave()

    def _replacement(self, position: int) -> tuple[Row | None, bool]:
        rng = np.random.default_rng([self._seed, order.REPLACEMENT, position])
        for _ in range(_REPLACEMENT_TRIES):
            try:
                index = self._order[int(rng.integers(2**40))]
                return self._prepare(index, functools.partial(self._source.__getitem__, index), rng)
            except BadExample:  # is counted when its own turn comes
                continue
        return None, False

    def _prepare(
        self, index: int, read: Callable[[], Example], rng: np.random.Generator
    ) -> tuple[Row, bool]:
        """The row of an example, and whether its caption was cut."""
        self.stages.enter("reading", f"example {index}")
        example = read()
        self.stages.enter("decoding", example.key)
        text = captions.choose(example.captions, rng)
        tokens, truncated = self._tokenizer.encode(text)
        if self._tokenizer.is_empty(tokens):  # as after "&nbsp;"
            raise BadExample("empty caption", example.key)
        image = images.pixels(example.image, example.key, self._image_size, self._crop, rng)
        return {"image": image, "tokens": tokens}, truncated


def reopen(
    config: ConfigDict,
    *,
    tokenizer_name: str,
    context_length: int,
    image_size: int,
    seed: int,
    batch_size: int,
    parts: int,
    fallback_dir: epath.Path | None,
) -> Rows:
    """The rows of a run in another process, which shares nothing with the one that began it.

    Args:
      config: the fields of `data` in configs/default.py.
      tokenizer_name: as `tokenizer.create` takes it.
      context_length: ids in a row.
      image_size, seed, batch_size, fallback_dir: as `mixture.create` takes them.
      parts: processes, of all hosts, that share a batch.

    Raises:
      UserError: the data is not there any more.
    """
    options = {"batch_size": batch_size, "parts": parts, "fallback_dir": fallback_dir}
    source, order_ = mixture.create(config, image_size, seed, **options)
    tokens = tokenizer.create(tokenizer_name, context_length)
    return Rows(source, order_, tokens, config, image_size=image_size, seed=seed)
