"""Rows loaded by many at once, in order, as batches."""

import atexit
import collections
import contextlib
import itertools
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import numpy as np

Row = dict[str, Any]  # arrays and NumPy scalars

_open: weakref.WeakSet[Generator] = weakref.WeakSet()

# Seconds that threads have to end when their generator is closed: a read that hangs must not keep
# the program from ending.
FAREWELL = 10.0


# Begins to load some rows, by their numbers; returns a function for each that waits for it.
Start = Callable[[Sequence[int]], Sequence[Callable[[], Row]]]

# Rows that are begun together: neighbours among them may be read in one piece.
_TOGETHER = 64
# Rows that are begun and wait for a thread: enough for 10,000 a second at a latency of 50 ms, and
# no more than memory has room for where their files are large.
_BEGUN = 512


def batches(
    start: Start,
    like: Row,
    *,
    count: int | None,
    batch_size: int,
    threads: int,
    prefetch: int,
) -> Generator[dict[str, np.ndarray], None, None]:
    """Batches of the rows 0, 1, ... in this order.

    Some hundred rows are begun ahead of the threads, so that what is read from far is on its way by
    the time one asks for it. The threads write their rows straight into the batches.
    Nothing tunes itself, so the rate is the same from pass to pass.

    Args:
      start: begins rows; its functions are called from `threads` threads at once, and what they
        raise is raised here, in place of the batch that the row belongs to.
      like: a row of zeros, for its shapes and dtypes.
      count: number of rows, None: without end; an incomplete last batch is dropped.
      batch_size: rows in a batch.
      threads: 0: one per CPU core.
      prefetch: batches that are ready, or being loaded, while the consumer has one.

    Yields:
      Arrays [batch_size, ...] by the names of `like`, new ones each time.
    """
    pool = _Threads(start, threads or os.cpu_count() or 1)
    return collect(pool, like, count=count, batch_size=batch_size, prefetch=prefetch)


def collect(
    pool: "Pool", like: Row, *, count: int | None, batch_size: int, prefetch: int
) -> Generator[dict[str, np.ndarray], None, None]:
    """Batches of the rows that a pool loads; other arguments and yields as of `batches`."""
    starts = itertools.count(0, batch_size)
    if count is not None:
        starts = range(0, count - batch_size + 1, batch_size)
    return closed_at_exit(_collect(pool, (Batch(like, batch_size, i) for i in starts), prefetch))


def closed_at_exit(generator: Generator) -> Generator:
    """Has the generator closed, and its threads ended, before the interpreter shuts down."""
    _open.add(generator)
    return generator


@atexit.register
def _close_all() -> None:
    # Twice: one that runs in the thread of another can be closed only after that one.
    for generator in (*_open, *_open):
        with contextlib.suppress(ValueError):  # it is running
            generator.close()


class Batch:
    """Arrays that are filled row by row.

    Attributes:
      numbers: of its rows among all.
      arrays: [size, ...] by name.
    """

    def __init__(self, like: Row, size: int, first: int):
        self.numbers = range(first, first + size)
        self.arrays = {name: np.empty((size, *row.shape), row.dtype) for name, row in like.items()}
        self._missing = size
        self._lock = threading.Lock()
        self._settled = threading.Event()
        self._error: BaseException | None = None

    def fill(self, load: Callable[[], Row], number: int) -> None:
        """Loads one row of all to its place in this batch."""
        try:
            row = load()
            for name, array in self.arrays.items():
                array[number - self.numbers.start] = row[name]
        except BaseException as error:
            self.fail(error)
        else:
            self.settle(1)

    def settle(self, rows: int) -> None:
        """So many more rows are in their place."""
        with self._lock:
            self._missing -= rows
            if not self._missing:
                self._settled.set()

    def fail(self, error: BaseException) -> None:
        """It will not be complete."""
        self._error = error
        self._settled.set()

    def wait(self) -> dict[str, np.ndarray]:
        """The arrays once they are full; raises the error of a row as soon as there is one."""
        self._settled.wait()
        if self._error is not None:
            raise self._error
        return self.arrays


class Pool(Protocol):
    """Loads the rows of batches in the order in which they are given."""

    def start(self) -> None: ...

    def give(self, batch: Batch) -> None: ...

    def close(self) -> None:
        """Drops what is not begun."""
        ...


class _Threads:
    """Threads that load the rows of batches; rows are begun when few that are begun remain."""

    def __init__(self, start: Start, threads: int):
        self._start = start
        # Daemons, for those that hang; the others are ended by `close`.
        self._threads = [
            threading.Thread(target=self._work, name=f"loading {i}", daemon=True)
            for i in range(threads)
        ]
        self._given: collections.deque[tuple[Batch, Sequence[int]]] = collections.deque()
        self._jobs: queue.SimpleQueue[tuple[Batch, int, Callable[[], Row]] | None]
        self._jobs = queue.SimpleQueue()
        self._beginning = threading.Lock()

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def give(self, batch: Batch) -> None:
        for first in range(0, len(batch.numbers), _TOGETHER):
            self._given.append((batch, batch.numbers[first : first + _TOGETHER]))
        self._begin()

    def close(self) -> None:
        """Drops what is not begun, and waits for what is."""
        self._given.clear()
        drain(self._jobs)
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + FAREWELL
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _begin(self) -> None:
        """Begins rows that were given, unless another thread is at it."""
        if not self._beginning.acquire(blocking=False):
            return
        try:
            while self._given and self._jobs.qsize() < _BEGUN:
                batch, numbers = self._given.popleft()
                try:
                    for number, load in zip(numbers, self._start(numbers)):
                        self._jobs.put((batch, number, load))
                except Exception as error:
                    batch.fail(error)
        finally:
            self._beginning.release()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._begin()
            batch, number, load = job
            batch.fill(load, number)


def drain(jobs: queue.SimpleQueue) -> None:
    """Drops all that is waiting."""
    with contextlib.suppress(queue.Empty):
        while True:
            jobs.get_nowait()


def _collect(
    pool: Pool, empty: Generator[Batch, None, None], prefetch: int
) -> Generator[dict[str, np.ndarray], None, None]:
    pool.start()
    ahead: collections.deque[Batch] = collections.deque()
    try:
        for batch in empty:
            pool.give(batch)
            ahead.append(batch)
            if len(ahead) > prefetch:
                yield ahead.popleft().wait()
        while ahead:
            yield ahead.popleft().wait()
    finally:
        pool.close()
