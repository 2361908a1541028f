"""The examples of a source worked on by several processes, in order, with progress."""

import logging
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import process
from typing import TYPE_CHECKING, TypeVar

import tqdm

from clip_jax.common import worker
from clip_jax.data import arguments
from clip_jax.errors import UserError

if TYPE_CHECKING:
    from clip_jax.data.sources.base import Source

Result = TypeVar("Result")
Work = Callable[["Source", Sequence[int]], Result]

PART = 128  # examples handed to a process at a time
_AHEAD = 4  # parts per process that may be under way

_source: "Source"  # of a worker


def parts(indices: Sequence[int]) -> list[Sequence[int]]:
    """The indices, `PART` at a time."""
    return [indices[start : start + PART] for start in range(0, len(indices), PART)]


def map_parts(
    work: Work[Result],
    source: "Source",
    data: arguments.Data,
    todo: Sequence[Sequence[int]],
    workers: int,
    title: str,
) -> Iterator[Result]:
    """`work(source, part)` of every part, in order; progress goes to stderr.

    Args:
      work: at module level, or a partial of such, since processes call it.
      source: of the examples.
      data: of the source, which every other process opens again.
      todo: indices of examples, in parts.
      workers: processes; 0: one per CPU core; 1: this one.
      title: of the progress line.
    """
    workers = min(workers or os.cpu_count() or 1, len(todo))
    total = sum(map(len, todo))
    with tqdm.tqdm(desc=title, total=total, unit=" examples", mininterval=0.5) as bar:
        if workers > 1:
            mapped = _map(work, data, todo, workers)
        else:
            mapped = (work(source, part) for part in todo)
        for part, result in zip(todo, mapped):
            bar.update(len(part))
            yield result


def _map(
    work: Work[Result], data: arguments.Data, todo: Sequence[Sequence[int]], workers: int
) -> Iterator[Result]:
    context = multiprocessing.get_context("spawn")  # TensorFlow's threads do not survive a fork
    pool = futures.ProcessPoolExecutor(workers, context, _start, (data,))
    try:
        waiting: deque[futures.Future[Result]] = deque()
        for part in todo:
            waiting.append(pool.submit(_call, work, part))
            if len(waiting) > _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except process.BrokenProcessPool:
        raise UserError(
            f"One of {workers} processes ended without a word, most likely for lack of memory. "
            "Try fewer, such as --workers=1."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start(data: arguments.Data) -> None:
    global _source
    worker.begin()
    logging.disable(logging.WARNING)  # the parent has opened the source too, and said so
    _source = data.open()


def _call(work: Work[Result], part: Sequence[int]) -> Result:
    return work(_source, part)
