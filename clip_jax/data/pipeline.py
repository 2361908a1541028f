"""Sources to batches: one pipeline per host, entered at any example."""

import functools
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from clip_jax.data import images, loading, order, processes, rows
from clip_jax.data.crops import CENTER, Crop
from clip_jax.data.sources import base, reading
from clip_jax.data.sources.base import Source
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.errors import BadExample, UserError

Batch = dict[str, Any]

# The skipped share is not judged before so many examples (or one epoch) could have been seen.
_JUDGED_AFTER = 1000


class TrainPipeline:
    """The training batches of one host, from any position on, for ever.

    Position p (0, 1, 2, ... over the whole run, all hosts together) holds an example that is a
    pure function of the order and p. Step s holds the positions from s * batch_size on, in rows
    that do not depend on the number of hosts. So the state of the data in a checkpoint is the one
    number `start`.

    The place of an unusable example is taken by another one, chosen by (seed, p) too. Iterating
    ends in UserError once their share passes `config.max_skipped`.

    Attributes:
      examples_per_epoch: the length of the source.
      skipped: number of unusable examples met by this host, by reason.
      truncated: number of captions this host cut to the context length.
    """

    def __init__(
        self,
        source: Source,
        order_: order.Order,
        tokenizer: Tokenizer,
        config: ConfigDict,
        *,
        batch_size: int,
        image_size: int,
        seed: int,
        start: int = 0,
        part: int,
        parts: int,
        reopen: Callable[[], rows.Rows] | None = None,
    ):
        """Reads nothing yet.

        Args:
          source: not empty.
          order_: of its examples.
          tokenizer: of the captions.
          config: the fields of `data` in configs/default.py.
          batch_size: examples per step, over all hosts.
          image_size: pixels along a side.
          seed: non-negative.
          start: position of the first example.
          part: which part of each batch this host loads.
          parts: into how many the batch is split.
          reopen: `rows.reopen` of the same data, for `config.processes`.

        Raises:
          UserError: the batch does not divide by the hosts or lanes, or the source is empty.
        """
        if not len(source):
            raise UserError("The training data is empty.")
        if batch_size % order_.lanes:
            raise UserError(f"The order has {order_.lanes} lanes, no divisor of {batch_size}.")
        self.examples_per_epoch = len(source)
        self.skipped: Counter[str] = Counter()
        self.truncated = 0
        self._rows = rows.Rows(source, order_, tokenizer, config, image_size=image_size, seed=seed)
        self._lanes = order_.lanes
        self._config = config
        self._batch_size = batch_size
        self._start = start
        self._local = _local_rows(batch_size, part, parts)
        self._reopen = reopen
        self._pool: processes.Pool | None = None
        self._seen = 0
        self._bad_keys: list[str] = []
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Batch]:
        """Yields dict(image uint8 [b, h, w, 3], tokens int32 [b, l]), b the rows of this host."""
        config, like = self._config, self._rows.empty()
        options = {"count": None, "batch_size": len(self._local), "prefetch": config.prefetch}
        if not config.processes:
            return loading.batches(self._begin, like, threads=config.threads, **options)
        assert self._reopen is not None, "other processes have to open the data"
        self._pool = processes.Pool(
            self._reopen,
            like,
            self._position,
            self._settle,
            processes=min(config.processes, len(self._local)),
            threads=config.threads or os.cpu_count() or 1,
        )
        return loading.collect(self._pool, like, **options)

    def describe(self) -> str:
        """What the threads that load are at, wherever they are."""
        return self._rows.stages.describe() if self._pool is None else self._pool.describe()

    def _begin(self, counts: Sequence[int]) -> list[Callable[[], loading.Row]]:
        """Begins the `count`-th examples of this host since `start`."""
        begun = self._rows.start([self._position(count) for count in counts])
        return [functools.partial(self._finish, each) for each in begun]

    def _finish(self, begun: Callable[[], tuple[loading.Row | None, rows.Note]]) -> loading.Row:
        row, note = begun()
        self._settle(row is not None, note)
        assert row is not None
        return row

    def _position(self, count: int) -> int:
        step, row = divmod(count, len(self._local))
        # Row by row where there is one lane; else each lane's rows together, so that they are one
        # host's.
        lane, turn = divmod(self._local[row], self._batch_size // self._lanes)
        return self._start + step * self._batch_size + turn * self._lanes + lane

    def _settle(self, usable: bool, note: rows.Note) -> None:
        """Counts a row; UserError where it is none, or too many have been replaced."""
        self._count(note.bad)
        if not usable:
            raise UserError(
                f"Hardly any example of the training data is usable. {self._complaint()}"
            )
        if note.truncated:
            with self._lock:
                self.truncated += 1

    def _count(self, bad: BadExample | None) -> None:
        """Counts one example, usable or not; UserError where too many are not."""
        with self._lock:
            self._seen += 1
            if bad is None:
                return
            self.skipped[bad.reason] += 1
            if len(self._bad_keys) < 10:
                self._bad_keys.append(str(bad))
            judged = max(self._seen, min(_JUDGED_AFTER, self.examples_per_epoch))
            if self.skipped.total() > self._config.max_skipped * judged:
                raise UserError(
                    "More of the training data is unusable than data.max_skipped = "
                    f"{self._config.max_skipped} allows. {self._complaint()}"
                )

    def _complaint(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.most_common())
        return (
            f"Of {self._seen} examples read, {self.skipped.total()} were skipped ({reasons}); "
            f"among them: {'; '.join(self._bad_keys)}. Repair the data, or set "
            "--config.data.max_skipped to a share you accept."
        )


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    part: int,
    parts: int,
    threads: int,
    limit: int | None = None,
    crop: Crop = CENTER,
) -> Iterator[Batch]:
    """This host's share of every example once, in stored order.

    Args:
      source: of the examples.
      batch_size: examples per step, over all hosts; the last batch is padded, so every host
        yields the same number of batches of batch_size / parts rows.
      image_size: pixels along a side.
      part: which part of each batch this host loads.
      parts: into how many the batch is split.
      threads: that read and decode; 0: one per CPU core.
      limit: the first so many examples; None: all.
      crop: how an image becomes a square; not a random one.

    Yields:
      dict(image uint8 [b, h, w, 3], label int32 [b], index int32 [b] of the example in the source,
      mask bool [b]). The mask is False at padding and where an image is unusable, which is logged.
    """
    rows = _local_rows(batch_size, part, parts)
    total = len(source) if limit is None else min(limit, len(source))
    steps = -(-total // batch_size)
    skipped: Counter[str] = Counter()

    def begin(counts: Sequence[int]) -> list[Callable[[], loading.Row]]:
        steps_and_rows = (divmod(count, len(rows)) for count in counts)
        indices = [step * batch_size + rows[row] for step, row in steps_and_rows]
        there = [index for index in indices if index < total]  # the others are padding
        reads = dict(zip(there, reading.start(source, there)))
        return [functools.partial(load, index, reads.get(index)) for index in indices]

    def load(index: int, read: Callable[[], base.Example] | None) -> loading.Row:
        row = _empty_row(image_size, index)
        if read is not None:
            try:
                _fill_eval_row(row, read(), crop)
            except BadExample as bad:
                skipped[bad.reason] += 1
                logging.warning("Left out of the evaluation: %s", bad)
        return row

    like = _empty_row(image_size, 0)
    yield from loading.batches(
        begin, like, count=steps * len(rows), batch_size=len(rows), threads=threads, prefetch=2
    )
    if skipped:
        logging.warning(
            "%d of %d evaluation examples were unusable: %s",
            skipped.total(),
            total,
            dict(skipped),
        )


def eval_captions(
    source: Source, tokenizer: Tokenizer, *, threads: int, limit: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """All captions of every example, in stored order; every host reads them all.

    Args:
      source: of the examples.
      tokenizer: of the captions.
      threads: that read; 0: one per CPU core.
      limit: the first so many examples; None: all.

    Returns:
      The captions, int32 [n, l], and the index of each one's example in the source, int32 [n]. Of
      an unusable example there is none; nor of one without a caption, which is logged.
    """
    total = len(source) if limit is None else min(limit, len(source))

    def load(read: Callable[[], base.Example]) -> list[np.ndarray]:
        try:
            example = read()
        except BadExample:  # as its image is missing too, `eval_batches` says so
            return []
        rows = [tokenizer.encode(text)[0] for text in example.captions.texts]
        full = [row for row in rows if not tokenizer.is_empty(row)]
        if not full:
            logging.warning("Left out of the evaluation: %s has no caption", example.key)
        return full

    found = list(reading.by_threads(load, source, range(total), threads))
    tokens = [row for rows in found for row in rows]
    index = np.repeat(np.arange(total, dtype=np.int32), [len(rows) for rows in found])
    return np.array(tokens, np.int32).reshape(-1, tokenizer.context_length), index


def _local_rows(batch_size: int, part: int, parts: int) -> range:
    """The rows of the global batch that this host reads."""
    if batch_size % parts:
        raise UserError(
            f"A batch of {batch_size} examples cannot be split over {parts} hosts; choose "
            f"a multiple, such as {batch_size // parts * parts or parts}."
        )
    local = batch_size // parts
    return range(part * local, (part + 1) * local)


def _fill_eval_row(row: loading.Row, example: base.Example, crop: Crop) -> None:
    size = row["image"].shape[0]
    row["image"] = images.pixels(example.image, example.key, size, crop, None)
    row["label"] = np.int32(example.label)
    row["mask"] = np.bool_(True)


def _empty_row(image_size: int, index: int) -> loading.Row:
    return {
        "image": np.zeros((image_size, image_size, 3), np.uint8),
        "label": np.int32(-1),
        "index": np.int32(index),
        "mask": np.bool_(False),
    }
