"""Work in processes of this machine: in order, with progress, and ended with their parent."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import process
from typing import Any, TypeVar

import tqdm

from clip_jax.errors import UserError

Part = TypeVar("Part")
Result = TypeVar("Result")

_AHEAD = 4  # parts per process that may be submitted before their turn


def map_in_order(
    work: Callable[[Part], Result],
    parts: Sequence[Part],
    processes: int,
    *,
    initializer: Callable[..., None] | None = None,
    initargs: tuple[Any, ...] = (),
    ahead: int = _AHEAD,
    remark: str = "Run the same command with fewer, such as --workers=1.",
) -> Iterator[Result]:
    """Yields `work(part)` of every part, in order.

    Args:
      work: called in other processes, so that it must be picklable.
      parts: the arguments of the calls.
      processes: number of processes; at most one per part is started.
      initializer: called in each process first, with `initargs`.
      initargs: arguments of `initializer`.
      ahead: parts per process that may be submitted before their turn; bounds the memory for
        results.
      remark: remedy, which ends the error of a process that was killed.

    Raises:
      UserError: a process was killed.
    """
    processes = min(processes, len(parts))
    if not processes:
        return
    context = multiprocessing.get_context("spawn")  # threads of JAX would not survive a fork
    pool = futures.ProcessPoolExecutor(processes, context, _begin, (initializer, initargs))
    try:
        waiting: deque[futures.Future[Result]] = deque()
        for part in parts:
            waiting.append(pool.submit(work, part))
            if len(waiting) > ahead * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except process.BrokenProcessPool:
        raise UserError(
            f"One of {processes} processes was killed, most likely for lack of memory. {remark}"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def progress(title: str, total: int, unit: str, leave: bool = True) -> tqdm.tqdm:
    """A progress line on stderr: redrawn often on a terminal, seldom in a log.

    Args:
      title: begins the line.
      total: number of units.
      unit: name of a unit, with a space before it.
      leave: whether the line stays when all is done.
    """
    every = 0.5 if sys.stderr.isatty() else 30.0  # seconds
    return tqdm.tqdm(desc=title, total=total, unit=unit, leave=leave, mininterval=every)


def count(workers: int) -> int:
    """The number of processes that a flag asks for; 0: one per CPU core."""
    return workers or os.cpu_count() or 1


def begin_worker() -> None:
    """Leaves signals to the parent, which ends its workers, and ends when the parent is killed.

    Ctrl-C, a closed terminal and SLURM signal all processes of a run, not the first alone.

    Every process that works for another one calls it first.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _begin(initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    begin_worker()
    if initializer is not None:
        initializer(*initargs)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
