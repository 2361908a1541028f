"""Rows loaded by separate processes, in order, as batches.

Decoders release the GIL, the code around them does not: past some three cores, threads of one
process wait for each other. Each process here has threads of its own, opens the data itself and
writes rows into memory that it shares with the process that started it.

A process is sent plain data: a description of the rows, and the numbers of those wanted. It returns
the rows, in shared memory, and the stats of each.
"""

import collections
import ctypes
import dataclasses
import logging
import math
import multiprocessing
import multiprocessing.connection
import queue
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import numpy as np

from clip_jax.common import processes
from clip_jax.data import loading
from clip_jax.data.loading import IDLE, Load, Row, Stages
from clip_jax.data.rows import Positions, Rows, RowStats, Spec
from clip_jax.errors import UserError

_ROWS = 16  # rows of a job, which a process is given at a time
_AHEAD = 3  # jobs that a process has been given and not answered yet
_REPORT_EVERY = 1.0  # seconds between two reports of what a process is doing
_REPORT_BYTES = 2000

# Threads would survive a fork in an unknown state, JAX's above all.
_spawn = multiprocessing.get_context("spawn")


class Pool:
    """Processes that load the rows of batches, each the same part of every batch.

    In a windowed order, neighbours in a batch are neighbours in storage: so hardly anything is read
    by two of them.
    """

    def __init__(
        self, spec: Spec, positions: Positions, like: Row, *, processes: int, threads: int
    ):
        """Starts nothing yet.

        Args:
          spec: describes the rows, which every process opens.
          positions: the positions of the rows by their number.
          like: a row of zeros, for its shapes and dtypes.
          processes: number of processes.
          threads: number of threads that they have together; at least one each.
        """
        spec = dataclasses.replace(spec, parts=spec.parts * processes)
        own_threads = max(1, threads // processes)
        self._workers = [
            _Worker(number, spec, positions, like, own_threads) for number in range(processes)
        ]

    def start(self) -> None:
        for each in self._workers:
            each.start()

    def submit(self, batch: loading.Batch) -> None:
        numbers, count = batch.numbers, len(self._workers)
        for i, each in enumerate(self._workers):
            first, end = (len(numbers) * place // count for place in (i, i + 1))
            for start in range(first, end, _ROWS):
                each.jobs.put((batch, numbers[start : min(start + _ROWS, end)]))

    def close(self) -> None:
        for each in self._workers:
            each.close()

    def describe(self) -> str:
        """Returns the work of the processes, as `Stages.describe`; up to a second old."""
        reports = {each.name: each.report() for each in self._workers}
        busy = [f"{name}: {text}" for name, text in reports.items() if text != IDLE]
        return "; ".join(busy) or IDLE


class _Worker:
    """A process, and the thread of this one that gives it jobs and takes the rows it has loaded."""

    def __init__(self, number: int, spec: Spec, positions: Positions, like: Row, threads: int):
        self.name = f"loading {number}"
        self.jobs: queue.SimpleQueue[tuple[loading.Batch, range] | None] = queue.SimpleQueue()
        rows = _AHEAD * _ROWS
        shared = _spawn.RawArray(ctypes.c_byte, rows * sum(part.nbytes for part in like.values()))
        self._arrays = _as_arrays(shared, like, rows)
        self._report = _spawn.RawArray(ctypes.c_char, _REPORT_BYTES)
        self._link, link = _spawn.Pipe()
        self._theirs = link
        arguments = link, spec, positions, shared, like, self._report, threads
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
        self._process.join(loading.JOIN_TIMEOUT)
        self._thread.join(loading.JOIN_TIMEOUT)

    def report(self) -> str:
        return self._report.value.decode(errors="replace") or IDLE

    def _serve(self) -> None:
        sent: collections.deque[tuple[loading.Batch, range, int]] = collections.deque()
        try:
            self._receive()  # confirms that the data are open
            self._exchange(sent)
        except BaseException as error:
            for batch, *_ in sent:
                batch.fail(error)
            while (job := self.jobs.get()) is not None:
                job[0].fail(error)

    def _exchange(self, sent: collections.deque[tuple[loading.Batch, range, int]]) -> None:
        """Exchanges jobs for rows until there are no more jobs.

        Args:
          sent: the jobs that are sent and not yet answered, oldest first; kept up to date.
        """
        place = 0
        while True:
            if sent and (len(sent) == _AHEAD or self.jobs.empty()):
                self._take(*sent[0])
                sent.popleft()
                continue
            job = self.jobs.get()
            if job is None:
                return
            batch, numbers = job
            self._send((place, numbers))
            sent.append((batch, numbers, place))
            place = (place + _ROWS) % (_AHEAD * _ROWS)

    def _take(self, batch: loading.Batch, numbers: range, place: int) -> None:
        """Copies the rows that have come, since later ones are written to the same place."""
        stats: Sequence[RowStats] = self._receive()
        first = numbers.start - batch.numbers.start
        for name, array in self._arrays.items():
            batch.arrays[name][first : first + len(numbers)] = array[place : place + len(numbers)]
        batch.record(first, stats)

    def _send(self, message: Any) -> None:
        try:
            self._link.send(message)
        except OSError:
            raise self._gone() from None

    def _receive(self) -> Any:
        try:
            answer = self._link.recv()
        except (EOFError, OSError):
            raise self._gone() from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _gone(self) -> UserError:
        self._process.join(loading.JOIN_TIMEOUT)
        return UserError(
            f"A process that loads data was killed (exit status {self._process.exitcode}), most "
            "likely for lack of memory. Try fewer with --config.data.processes; the same command "
            "resumes at the last checkpoint."
        )


# ---- In the process ------------------------------------------------------------------------------


def _work(
    link: multiprocessing.connection.Connection,
    spec: Spec,
    positions: Positions,
    shared: Any,
    like: Row,
    report: Any,
    threads: int,
) -> None:
    """Loads the rows that are asked for, until the connection closes."""
    processes.begin_worker()
    report.value = b"opening the data"
    try:
        logging.disable(logging.WARNING)  # the parent has opened the data too, and said so
        rows = spec.open()
        logging.disable(logging.NOTSET)
    except Exception as error:
        link.send(_portable(error))
        return
    link.send("open")
    arrays = _as_arrays(shared, like, _AHEAD * _ROWS)
    threading.Thread(target=_publish, args=(rows.stages, report), daemon=True).start()

    def write(place: int, load: Load) -> RowStats:
        row, stats = load()
        if row is not None:
            for name, array in arrays.items():
                array[place] = row[name]
        return stats

    jobs: queue.SimpleQueue[tuple[range, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_begin, args=(link, rows, positions, jobs), daemon=True).start()
    with futures.ThreadPoolExecutor(threads) as pool:
        while (job := jobs.get()) is not None:
            places, begun = job
            if isinstance(begun, Exception):
                link.send(_portable(begun))
                continue
            try:
                answer = list(pool.map(write, places, begun))
            except Exception as error:
                answer = _portable(error)
            link.send(answer)


def _begin(
    link: multiprocessing.connection.Connection,
    rows: Rows,
    positions: Positions,
    jobs: "queue.SimpleQueue[tuple[range, Any] | None]",
) -> None:
    """Begins to read the rows of a job as soon as it comes, ahead of the threads that load them."""
    while True:
        try:
            first, numbers = link.recv()
        except (EOFError, OSError):
            jobs.put(None)
            return
        try:
            begun: Any = rows.start([positions[number] for number in numbers])
        except Exception as error:
            begun = error
        jobs.put((range(first, first + len(numbers)), begun))


def _publish(stages: Stages, report: Any) -> None:
    while True:
        report.value = stages.describe().encode()[: _REPORT_BYTES - 1]
        time.sleep(_REPORT_EVERY)


def _portable(error: Exception) -> Exception:
    """Returns an error that can be pickled and still says where it was raised."""
    if isinstance(error, UserError):
        return error
    return RuntimeError(
        "in a process that loads data:\n" + "".join(traceback.format_exception(error))
    )


def _as_arrays(shared: Any, like: Row, rows: int) -> dict[str, np.ndarray]:
    """Returns shared memory as arrays [rows, ...] by the names of `like`."""
    arrays, offset = {}, 0
    for name, part in like.items():
        shape = (rows, *part.shape)
        count = math.prod(shape)
        flat = np.frombuffer(shared, part.dtype, count, offset)
        arrays[name], offset = flat.reshape(shape), offset + flat.nbytes
    return arrays
