"""Rows loaded by processes of their own, in order, as batches.

Decoders let go of Python's lock, what is around them does not: past some three cores, threads of
one process wait for each other. Each process here has threads of its own, opens the data itself
and writes rows into memory that it shares with the one that started it.
"""

import collections
import ctypes
import logging
import math
import multiprocessing
import multiprocessing.connection
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from clip_jax.common import worker
from clip_jax.data import loading
from clip_jax.data.rows import Note, Row, Rows
from clip_jax.data.stages import IDLE, Stages
from clip_jax.errors import UserError

_ROWS = 16  # that a process is given at a time,
_AHEAD = 3  # and how often, before it has answered
_PUBLISHED = 1.0  # seconds between two reports of what a process is at
_REPORT = 2000  # bytes of one

# Threads would survive a fork in an unknown state, JAX's above all.
_spawn = multiprocessing.get_context("spawn")


class Pool:
    """Processes that load the rows of batches, each the same part of every batch.

    In a windowed order, neighbours in a batch are neighbours in storage: so hardly anything is read
    by two of them.
    """

    def __init__(
        self,
        reopen: Callable[[], Rows],
        like: Row,
        position: Callable[[int], int],
        settle: Callable[[bool, Note], None],
        *,
        processes: int,
        threads: int,
    ):
        """Starts nothing yet.

        Args:
          reopen: opens the data; can be pickled, and is called in every process.
          like: a row of zeros, for its shapes and dtypes.
          position: of the rows by their number.
          settle: told of every row, and whether there is one; what it raises is raised in place of
            the row's batch.
          processes: to start.
          threads: that they have together; at least one each.
        """
        share = max(1, threads // processes)
        self._workers = [
            _Worker(number, reopen, like, position, settle, share) for number in range(processes)
        ]

    def start(self) -> None:
        for each in self._workers:
            each.start()

    def give(self, batch: loading.Batch) -> None:
        numbers, count = batch.numbers, len(self._workers)
        for i, each in enumerate(self._workers):
            first, end = (len(numbers) * place // count for place in (i, i + 1))
            for start in range(first, end, _ROWS):
                each.jobs.put((batch, numbers[start : min(start + _ROWS, end)]))

    def close(self) -> None:
        for each in self._workers:
            each.close()

    def describe(self) -> str:
        """What the processes are at, as `Stages.describe`; up to a second old."""
        said = {each.name: each.doing() for each in self._workers}
        busy = [f"{name}: {text}" for name, text in said.items() if text != IDLE]
        return "; ".join(busy) or IDLE


class _Worker:
    """A process, and the thread of this one that gives it work and takes what it has loaded."""

    def __init__(
        self,
        number: int,
        reopen: Callable[[], Rows],
        like: Row,
        position: Callable[[int], int],
        settle: Callable[[bool, Note], None],
        threads: int,
    ):
        self.name = f"loading {number}"
        self.jobs: queue.SimpleQueue[tuple[loading.Batch, range] | None] = queue.SimpleQueue()
        self._position, self._settle = position, settle
        rows = _AHEAD * _ROWS
        shared = _spawn.RawArray(ctypes.c_byte, rows * sum(part.nbytes for part in like.values()))
        self._arrays = _as_arrays(shared, like, rows)
        self._doing = _spawn.RawArray(ctypes.c_char, _REPORT)
        self._link, link = _spawn.Pipe()
        self._theirs = link
        arguments = link, reopen, shared, like, self._doing, threads
        self._process = _spawn.Process(target=_work, args=arguments, name=self.name, daemon=True)
        self._thread = threading.Thread(target=self._serve, name=self.name, daemon=True)

    def start(self) -> None:
        self._process.start()
        self._theirs.close()  # so that the process holds the only one, and its end is noticed
        self._thread.start()

    def close(self) -> None:
        """Drops what is not begun, and what is."""
        loading.drain(self.jobs)
        self.jobs.put(None)
        self._process.kill()  # it only reads
        self._process.join(loading.FAREWELL)
        self._thread.join(loading.FAREWELL)

    def doing(self) -> str:
        return self._doing.value.decode(errors="replace") or IDLE

    def _serve(self) -> None:
        given: collections.deque[tuple[loading.Batch, range, int]] = collections.deque()
        try:
            self._answer()  # that the data are open
            self._exchange(given)
        except BaseException as error:
            for batch, *_ in given:
                batch.fail(error)
            while (job := self.jobs.get()) is not None:
                job[0].fail(error)

    def _exchange(self, given: collections.deque[tuple[loading.Batch, range, int]]) -> None:
        """Until there are no more jobs; `given`: those sent and not yet answered, oldest first."""
        place = 0
        while True:
            if given and (len(given) == _AHEAD or self.jobs.empty()):
                self._take(*given[0])
                given.popleft()
                continue
            job = self.jobs.get()
            if job is None:
                return
            batch, numbers = job
            self._send((place, [self._position(number) for number in numbers]))
            given.append((batch, numbers, place))
            place = (place + _ROWS) % (_AHEAD * _ROWS)

    def _take(self, batch: loading.Batch, numbers: range, place: int) -> None:
        """Copies the rows that have come, since their place is needed for others."""
        found: Sequence[tuple[bool, Note]] = self._answer()
        for usable, note in found:
            self._settle(usable, note)
        first = numbers.start - batch.numbers.start
        for name, array in self._arrays.items():
            batch.arrays[name][first : first + len(numbers)] = array[place : place + len(numbers)]
        batch.settle(len(numbers))

    def _send(self, message: Any) -> None:
        try:
            self._link.send(message)
        except OSError:
            raise self._gone() from None

    def _answer(self) -> Any:
        try:
            answer = self._link.recv()
        except (EOFError, OSError):
            raise self._gone() from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _gone(self) -> UserError:
        self._process.join(loading.FAREWELL)
        return UserError(
            f"A process that loads data ended without a word (exit status {self._process.exitcode})"
            ", most likely for lack of memory. Try fewer with --config.data.processes; the same "
            "command resumes at the last checkpoint."
        )


# ---- In the process ------------------------------------------------------------------------------


def _work(
    link: multiprocessing.connection.Connection,
    reopen: Callable[[], Rows],
    shared: Any,
    like: Row,
    doing: Any,
    threads: int,
) -> None:
    """Loads what it is told to, until nobody tells it any more."""
    worker.begin()
    doing.value = b"opening the data"
    try:
        logging.disable(logging.WARNING)  # the parent has opened the data too, and said so
        rows = reopen()
        logging.disable(logging.NOTSET)
    except Exception as error:
        link.send(_portable(error))
        return
    link.send("open")
    arrays = _as_arrays(shared, like, _AHEAD * _ROWS)
    threading.Thread(target=_publish, args=(rows.stages, doing), daemon=True).start()

    def load(place: int, begun: Callable[[], tuple[Row | None, Note]]) -> tuple[bool, Note]:
        row, note = begun()
        if row is not None:
            for name, array in arrays.items():
                array[place] = row[name]
        return row is not None, note

    jobs: queue.SimpleQueue[tuple[range, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_begin, args=(link, rows, jobs), daemon=True).start()
    with futures.ThreadPoolExecutor(threads) as pool:
        while (job := jobs.get()) is not None:
            places, begun = job
            if isinstance(begun, Exception):
                link.send(_portable(begun))
                continue
            try:
                answer = list(pool.map(load, places, begun))
            except Exception as error:
                answer = _portable(error)
            link.send(answer)


def _begin(
    link: multiprocessing.connection.Connection,
    rows: Rows,
    jobs: "queue.SimpleQueue[tuple[range, Any] | None]",
) -> None:
    """Begins what is asked for as soon as it is, ahead of the threads that load it."""
    while True:
        try:
            first, positions = link.recv()
        except (EOFError, OSError):
            jobs.put(None)
            return
        try:
            begun: Any = rows.start(positions)
        except Exception as error:
            begun = error
        jobs.put((range(first, first + len(positions)), begun))


def _publish(stages: Stages, doing: Any) -> None:
    while True:
        doing.value = stages.describe().encode()[: _REPORT - 1]
        time.sleep(_PUBLISHED)


def _portable(error: Exception) -> Exception:
    """An error that can be pickled and still says where it is from."""
    if isinstance(error, UserError):
        return error
    return RuntimeError(
        "in a process that loads data:\n" + "".join(traceback.format_exception(error))
    )


def _as_arrays(shared: Any, like: Row, rows: int) -> dict[str, np.ndarray]:
    """Shared memory as arrays [rows, ...] by the names of `like`."""
    arrays, offset = {}, 0
    for name, part in like.items():
        shape = (rows, *part.shape)
        count = math.prod(shape)
        flat = np.frombuffer(shared, part.dtype, count, offset)
        arrays[name], offset = flat.reshape(shape), offset + flat.nbytes
    return arrays
