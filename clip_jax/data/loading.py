"""Rows loaded in parallel, in order, as batches."""

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
from typing import Any, NamedTuple, Protocol

import numpy as np

Row = dict[str, Any]  # arrays and NumPy scalars
Load = Callable[[], tuple[Row | None, Any]]  # waits for a row; with it, what `Batch.stats` gets
Start = Callable[[Sequence[int]], Sequence[Load]]  # begins to load rows, by their numbers
Check = Callable[[Sequence[Any]], None]  # looks at stats as rows come, in any order; may raise

# Seconds that threads have to end when their generator is closed: a read that hangs must not keep
# the program from ending.
JOIN_TIMEOUT = 10.0

# Rows that are begun together: neighbours among them may be read in one piece.
_TOGETHER = 64
# Rows that are begun and wait for a thread: enough for 10,000 a second at a latency of 50 ms, and
# no more than memory has room for where their files are large.
_BEGUN = 512

_open: weakref.WeakSet[Generator] = weakref.WeakSet()


class Batch:
    """Arrays that are written row by row.

    Attributes:
      numbers: the numbers of its rows among all rows.
      arrays: [size, ...] by name.
      stats: one entry per row, as its `Load` returned it.
    """

    def __init__(self, like: Row, size: int, first: int, check: Check | None = None):
        self.numbers = range(first, first + size)
        self.arrays = {name: np.empty((size, *row.shape), row.dtype) for name, row in like.items()}
        self.stats: list[Any] = [None] * size
        self._check = check
        self._missing = size
        self._lock = threading.Lock()
        self._finished = threading.Event()
        self._error: BaseException | None = None

    def write(self, load: Load, number: int) -> None:
        """Loads one row to its place; of a row that is None, only the stats are recorded."""
        place = number - self.numbers.start
        try:
            row, stats = load()
            if row is not None:
                for name, array in self.arrays.items():
                    array[place] = row[name]
        except BaseException as error:
            self.fail(error)
        else:
            self.record(place, [stats])

    def record(self, place: int, stats: Sequence[Any]) -> None:
        """Records that the rows from `place` on are written, and their stats."""
        if self._check is not None:
            try:
                self._check(stats)
            except Exception as error:
                self.fail(error)
                return
        self.stats[place : place + len(stats)] = stats
        with self._lock:
            self._missing -= len(stats)
            if not self._missing:
                self._finished.set()

    def fail(self, error: BaseException) -> None:
        """Records that the batch will not be complete."""
        self._error = error
        self._finished.set()

    def wait(self) -> "Batch":
        """Returns itself once it is complete; raises the error of a row as soon as there is one."""
        self._finished.wait()
        if self._error is not None:
            raise self._error
        return self


def batches(
    start: Start,
    like: Row,
    *,
    count: int | None,
    batch_size: int,
    threads: int,
    prefetch: int,
    check: Check | None = None,
) -> Generator[Batch, None, None]:
    """Yields batches of the rows 0, 1, ... in this order, loaded by threads.

    Some hundred rows are begun ahead of the threads, so that what is read from far is on its way by
    the time a thread asks for it. The threads write their rows straight into the batches.
    Nothing tunes itself, so the rate is the same from pass to pass.

    Args:
      start: begins rows. Its functions are called from `threads` threads at once. What they raise
        is raised here, in place of the batch that the row belongs to.
      like: a row of zeros, for its shapes and dtypes.
      count: number of rows; None: without end. An incomplete last batch is dropped.
      batch_size: rows in a batch.
      threads: number of threads; 0: one per CPU core.
      prefetch: batches that are ready, or being loaded, while the consumer has one.
      check: called with the stats of rows as they come, from any thread. What it raises is raised
        here, in place of the batch.

    Yields:
      Complete batches, with new arrays each time.
    """
    pool = _Threads(start, threads or os.cpu_count() or 1)
    return collect(pool, like, count=count, batch_size=batch_size, prefetch=prefetch, check=check)


def collect(
    pool: "Pool",
    like: Row,
    *,
    count: int | None,
    batch_size: int,
    prefetch: int,
    check: Check | None = None,
) -> Generator[Batch, None, None]:
    """Yields batches of the rows that a pool loads; other arguments as of `batches`."""
    starts = itertools.count(0, batch_size)
    if count is not None:
        starts = range(0, count - batch_size + 1, batch_size)
    empty = (Batch(like, batch_size, first, check) for first in starts)
    return closed_at_exit(_collect(pool, empty, prefetch))


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


def _collect(
    pool: "Pool", empty: Generator[Batch, None, None], prefetch: int
) -> Generator[Batch, None, None]:
    pool.start()
    ahead: collections.deque[Batch] = collections.deque()
    try:
        for batch in empty:
            pool.submit(batch)
            ahead.append(batch)
            if len(ahead) > prefetch:
                yield ahead.popleft().wait()
        while ahead:
            yield ahead.popleft().wait()
    finally:
        pool.close()


# ---- Workers -------------------------------------------------------------------------------------


class Pool(Protocol):
    """Loads the rows of batches in the order in which they are submitted."""

    def start(self) -> None: ...

    def submit(self, batch: Batch) -> None: ...

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
        self._submitted: collections.deque[tuple[Batch, Sequence[int]]] = collections.deque()
        self._jobs: queue.SimpleQueue[tuple[Batch, int, Load] | None] = queue.SimpleQueue()
        self._beginning = threading.Lock()

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def submit(self, batch: Batch) -> None:
        for first in range(0, len(batch.numbers), _TOGETHER):
            self._submitted.append((batch, batch.numbers[first : first + _TOGETHER]))
        self._begin()

    def close(self) -> None:
        """Drops what is not begun, and waits for what is."""
        self._submitted.clear()
        drain(self._jobs)
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + JOIN_TIMEOUT
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _begin(self) -> None:
        """Begins rows that were submitted, unless another thread is at it."""
        if not self._beginning.acquire(blocking=False):
            return
        try:
            while self._submitted and self._jobs.qsize() < _BEGUN:
                batch, numbers = self._submitted.popleft()
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
            batch.write(load, number)


def drain(jobs: queue.SimpleQueue) -> None:
    """Drops all that is waiting."""
    with contextlib.suppress(queue.Empty):
        while True:
            jobs.get_nowait()


# ---- The state of the threads, so that a hang can be named ---------------------------------------

IDLE = "no thread is at work"


class _Work(NamedTuple):
    stage: str
    what: str
    since: float


class Stages:
    """The stage that each thread is in.

    Args:
      clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._now: dict[int, _Work] = {}

    def enter(self, stage: str, what: str) -> None:
        """Records that the calling thread begins a stage, such as "reading" of "example 7"."""
        self._now[threading.get_ident()] = _Work(stage, what, self._clock())

    def leave(self) -> None:
        """Records that the calling thread has nothing more to do."""
        self._now.pop(threading.get_ident(), None)

    def describe(self) -> str:
        """Returns the work of each thread and its duration, the longest first."""
        now = self._clock()
        work = sorted(self._now.copy().values(), key=lambda each: each.since)
        if not work:
            return IDLE
        shown = [f"{each.stage} {each.what} for {now - each.since:,.0f} s" for each in work[:5]]
        more = f", and {len(work) - 5} more threads" if len(work) > 5 else ""
        return "; ".join(shown) + more
