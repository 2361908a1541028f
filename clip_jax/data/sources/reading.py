"""Reads of many examples at a time."""

import collections
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any, TypeVar


def start(source: Any, indices: Sequence[int]) -> list[Callable[[], Any]]:
    """Begins to read examples that are wanted soon.

    From a bucket they come beside each other, neighbours in one piece; others are read when their
    function is called.

    Args:
      source: a source, or another collection with such a method, as records have.
      indices: positions in the source.

    Returns:
      For each, a function that waits for it; it returns and raises what `source[index]` would.
    """
    own = getattr(source, "start", None)
    return own(indices) if own else [functools.partial(source.__getitem__, i) for i in indices]


_AHEAD = 128  # examples that `in_turn` has under way
_TOGETHER = 256  # that `by_threads` has

Result = TypeVar("Result")


def by_threads(
    work: Callable[[Callable[[], Any]], Result],
    source: Any,
    indices: Sequence[int],
    threads: int,
) -> Iterator[Result]:
    """Yields the results of `work` for many examples, in order.

    Args:
      work: called with each function that `start` returns.
      source: see `start`.
      indices: positions in the source.
      threads: number of threads; 0: one per CPU core.
    """
    with futures.ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        for first in range(0, len(indices), _TOGETHER):
            yield from pool.map(work, start(source, indices[first : first + _TOGETHER]))


def in_turn(source: Any, indices: Iterable[int]) -> Iterator[Callable[[], Any]]:
    """Yields the functions of `start` for many examples, those of the next few begun.

    Arguments as of `start`.
    """
    upcoming, remaining = collections.deque[Callable[[], Any]](), iter(indices)
    while True:
        if len(upcoming) <= _AHEAD // 2:
            upcoming += start(source, list(itertools.islice(remaining, _AHEAD // 2)))
        if not upcoming:
            return
        yield upcoming.popleft()
