"""Sources to batches: one pipeline per host, entered at any example."""

import contextlib
import dataclasses
import functools
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np

from clip_jax.data import images, loading, order, rows
from clip_jax.data.crops import CENTER, Crop
from clip_jax.data.sources import base, reading
from clip_jax.data.sources.base import Source
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.errors import BadExample, UserError

Batch = dict[str, Any]

# The fraction of skipped examples is not judged before so many examples (or one epoch) could have
# been seen.
_JUDGED_AFTER = 1000
_MANY_CORES = 16  # threads of one process make no more of them than of three


class TrainPipeline:
    """The training batches of one host, from any position on, without end.

    Position p (0, 1, 2, ... over the whole run, all hosts together) holds an example that is a
    pure function of the order and p. Step s holds the positions from s * batch_size on, in rows
    that do not depend on the number of hosts. So the state of the data in a checkpoint is the one
    number `start`.

    The place of an unusable example is taken by another one, chosen by (seed, p) too. Iterating
    ends in UserError once their fraction exceeds `config.max_skipped`.

    Attributes:
      examples_per_epoch: the length of the source.
      skipped: number of unusable examples in the batches so far, by reason.
      truncated: number of captions in the batches so far that were cut to the context length.
    """

    def __init__(
        self,
        source: Source,
        order_: order.Order,
        tokenizer: Tokenizer,
        spec: rows.Spec,
        *,
        start: int = 0,
        part: int = 0,
    ):
        """Reads nothing yet.

        Args:
          source: the examples; not empty.
          order_: their order.
          tokenizer: encodes the captions.
          spec: describes the three and their rows; with `config.processes`, other processes open
            the data by it.
          start: position of the first example.
          part: the part of each batch that this host loads, of `spec.parts`.

        Raises:
          UserError: the batch cannot be divided by the hosts or streams, or the source is empty.
        """
        if not len(source):
            raise UserError("The training data is empty.")
        if spec.batch_size % order_.streams:
            raise UserError(
                f"The order has {order_.streams} interleaved streams, no divisor of "
                f"{spec.batch_size}."
            )
        self.examples_per_epoch = len(source)
        self.skipped: Counter[str] = Counter()
        self.truncated = 0
        self._spec = spec
        self._rows = spec.bind(source, order_, tokenizer)
        local = _local_rows(spec.batch_size, part, spec.parts)
        self._positions = rows.Positions(start, spec.batch_size, local, order_.streams)
        self._describe = self._rows.stages.describe
        self._limit = _Limit(spec.config.max_skipped, len(source))

    def __iter__(self) -> Iterator[Batch]:
        """Yields dict(image uint8 [b, h, w, 3], tokens int32 [b, l]), b the rows of this host.

        With c captions an image, tokens are [b, c, l]. Where pairs have weights, there is also
        weight float32 [b].
        """
        with contextlib.closing(self._batches()) as batches:
            for batch in batches:
                for _, skipped, truncated in batch.stats:
                    self.truncated += truncated
                    if skipped is not None:
                        self.skipped[skipped.reason] += 1
                yield batch.arrays

    def reread(self, start: int) -> Batch:
        """Reads once more the rows of this host in the step whose positions begin at `start`.

        Returns:
          A batch, with three more arrays: the "position" of each row in the run, the "key" of the
          example there, and "replaced", whether that was unusable and the row is another one's.
        """
        numbers, config = dataclasses.replace(self._positions, start=start), self._spec.config
        positions = [numbers[number] for number in range(len(numbers.rows))]
        batches = loading.batches(
            lambda numbers: self._rows.start([positions[number] for number in numbers]),
            self._rows.empty(),
            count=len(positions),
            batch_size=len(positions),
            threads=config.threads,
            prefetch=1,
        )
        with contextlib.closing(batches):
            batch = next(batches)
        return {
            **batch.arrays,
            "position": np.array(positions),
            "key": np.array(self._rows.keys(positions, config.threads)),
            "replaced": np.array([skipped is not None for _, skipped, _ in batch.stats]),
        }

    def describe(self) -> str:
        """Returns the work of the threads that load, in whatever process they are."""
        return self._describe()

    def _batches(self) -> Generator[loading.Batch, None, None]:
        config, like, size = self._spec.config, self._rows.empty(), len(self._positions.rows)
        prefetch = config.prefetch
        processes_wanted = count_processes(config.processes)
        if not processes_wanted:
            return loading.batches(
                self._start,
                like,
                count=None,
                batch_size=size,
                threads=config.threads,
                prefetch=prefetch,
                check=self._limit.check,
            )
        from clip_jax.data import processes  # most runs load in threads

        pool = processes.Pool(
            self._spec,
            self._positions,
            like,
            processes=min(processes_wanted, size),
            threads=config.threads or os.cpu_count() or 1,
        )
        self._describe = pool.describe
        return loading.collect(
            pool,
            like,
            count=None,
            batch_size=size,
            prefetch=prefetch,
            check=self._limit.check,
        )

    def _start(self, numbers: Sequence[int]) -> Sequence[loading.Load]:
        return self._rows.start([self._positions[number] for number in numbers])


def count_processes(asked: int) -> int:
    """Returns the loader processes of `config.data.processes`, on this machine."""
    cores = os.cpu_count() or 1
    if asked >= 0:
        return asked
    return cores // 4 if cores >= _MANY_CORES else 0


class _Limit:
    """The end of a run whose data are unusable, judged as rows come, before a batch is full."""

    def __init__(self, max_skipped: float, examples: int):
        """Counts nothing yet.

        Args:
          max_skipped: greatest fraction of unusable examples.
          examples: number of examples of an epoch.
        """
        self._max_skipped, self._examples = max_skipped, examples
        self._lock = threading.Lock()
        self._seen = 0
        self._skipped: Counter[str] = Counter()
        self._bad_keys: list[str] = []

    def check(self, stats: Sequence[rows.RowStats]) -> None:
        """Counts rows.

        Raises:
          UserError: there is no row for one, or too many have been replaced.
        """
        with self._lock:
            for usable, skipped, _ in stats:
                self._seen += 1
                if skipped is not None:
                    self._skip(skipped)
                if not usable:
                    raise UserError(
                        f"Hardly any example of the training data is usable. {self._complaint()}"
                    )

    def _skip(self, bad: BadExample) -> None:
        self._skipped[bad.reason] += 1
        if len(self._bad_keys) < 10:
            self._bad_keys.append(str(bad))
        judged = max(self._seen, min(_JUDGED_AFTER, self._examples))
        if self._skipped.total() > self._max_skipped * judged:
            raise UserError(
                "More of the training data is unusable than data.max_skipped = "
                f"{self._max_skipped} allows. {self._complaint()}"
            )

    def _complaint(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self._skipped.most_common())
        return (
            f"Of {self._seen} examples read, {self._skipped.total()} were skipped ({reasons}); "
            f"among them: {'; '.join(self._bad_keys)}. Repair the data, or set "
            "--config.data.max_skipped to a fraction you accept."
        )


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    part: int,
    parts: int,
    threads: int,
    crop: Crop = CENTER,
) -> Iterator[Batch]:
    """Yields every example once, in stored order, each host its part of each batch.

    Args:
      source: the examples.
      batch_size: examples per step, over all hosts; the last batch is padded, so every host
        yields the same number of batches of batch_size / parts rows.
      image_size: pixels along a side.
      part: the part of each batch that this host loads.
      parts: number of parts that a batch is split into.
      threads: number of threads that read and decode; 0: one per CPU core.
      crop: makes the image a square; not a random one.

    Yields:
      dict(image uint8 [b, h, w, 3], label int32 [b], index int32 [b] of the example in the source,
      mask bool [b]). The mask is False at padding and where an image is unusable, which is logged.
    """
    rows = _local_rows(batch_size, part, parts)
    total = len(source)
    steps = -(-total // batch_size)

    def start(numbers: Sequence[int]) -> list[loading.Load]:
        steps_and_rows = (divmod(number, len(rows)) for number in numbers)
        indices = [step * batch_size + rows[row] for step, row in steps_and_rows]
        there = [index for index in indices if index < total]  # the others are padding
        reads = dict(zip(there, reading.start(source, there)))
        return [
            functools.partial(_load_eval_row, index, reads.get(index), image_size, crop)
            for index in indices
        ]

    batches = loading.batches(
        start,
        _empty_row(image_size, 0),
        count=steps * len(rows),
        batch_size=len(rows),
        threads=threads,
        prefetch=2,
    )
    skipped: Counter[str] = Counter()
    with contextlib.closing(batches):
        for batch in batches:
            for bad in filter(None, batch.stats):
                skipped[bad.reason] += 1
                logging.warning("Left out of the evaluation: %s", bad)
            yield batch.arrays
    if skipped:
        logging.warning(
            "%d of %d evaluation examples were unusable: %s",
            skipped.total(),
            total,
            dict(skipped),
        )


def _local_rows(batch_size: int, part: int, parts: int) -> range:
    """The rows of the global batch that this host reads."""
    if batch_size % parts:
        raise UserError(
            f"A batch of {batch_size} examples cannot be split over {parts} hosts; choose "
            f"a multiple, such as {batch_size // parts * parts or parts}."
        )
    local = batch_size // parts
    return range(part * local, (part + 1) * local)


def _load_eval_row(
    index: int, read: Callable[[], base.Example] | None, image_size: int, crop: Crop
) -> tuple[loading.Row, BadExample | None]:
    """Returns the row of an example, or of padding where `read` is None; and why it is unusable."""
    row = _empty_row(image_size, index)
    if read is None:
        return row, None
    try:
        example = read()
        row["image"] = images.pixels(example.image, example.key, image_size, crop, None)
    except BadExample as bad:
        return row, bad
    row["label"] = np.int32(example.label)
    row["mask"] = np.bool_(True)
    return row, None


def _empty_row(image_size: int, index: int) -> loading.Row:
    return {
        "image": np.zeros((image_size, image_size, 3), np.uint8),
        "label": np.int32(-1),
        "index": np.int32(index),
        "mask": np.bool_(False),
    }
