"""The examples of a source worked on by several processes, in order, with progress."""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from clip_jax.common import processes
from clip_jax.data import arguments
from clip_jax.data.sources.base import Source

Result = TypeVar("Result")
Work = Callable[[Source, Sequence[int]], Result]

PART = 128  # examples handed to a process at a time

_source: Source  # the source of a worker


def parts(indices: Sequence[int]) -> list[Sequence[int]]:
    """Returns the indices, `PART` at a time."""
    return [indices[start : start + PART] for start in range(0, len(indices), PART)]


def map_parts(
    work: Work[Result],
    source: Source,
    data: arguments.Data,
    todo: Sequence[Sequence[int]],
    workers: int,
    title: str,
) -> Iterator[Result]:
    """Yields `work(source, part)` of every part, in order; progress goes to stderr.

    Args:
      work: at module level, or a partial of such, since processes call it.
      source: the examples.
      data: description of the source, by which every other process opens it again.
      todo: indices of examples, in parts.
      workers: number of processes; 0: one per CPU core; 1: this one.
      title: title of the progress line.
    """
    count = processes.count(workers)
    if min(count, len(todo)) > 1:
        call = functools.partial(_call, work)
        results = processes.map_in_order(call, todo, count, initializer=_open, initargs=(data,))
    else:
        results = (work(source, part) for part in todo)
    with processes.progress(title, sum(map(len, todo)), " examples") as bar:
        for part, result in zip(todo, results):
            bar.update(len(part))
            yield result


def _open(data: arguments.Data) -> None:
    global _source
    logging.disable(logging.WARNING)  # the parent has opened the source too, and said so
    _source = data.open()


def _call(work: Work[Result], part: Sequence[int]) -> Result:
    return work(_source, part)
