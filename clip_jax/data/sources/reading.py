"""Reads of many examples at a time, and of neighbours in one piece."""

import collections
import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any, Generic, TypeVar

_AHEAD = 128  # examples that `in_order` has under way
_TOGETHER = 256  # examples that `by_threads` has under way

Result = TypeVar("Result")
Chunk = TypeVar("Chunk")


def start(source: Any, indices: Sequence[int]) -> list[Callable[[], Any]]:
    """Begins to read examples that are wanted soon.

    From a bucket they are read concurrently, neighbours in one piece; others are read when their
    function is called.

    Args:
      source: a source, or another collection with such a method, as records have.
      indices: positions in the source.

    Returns:
      For each, a function that waits for it; it returns and raises what `source[index]` would.
    """
    own = getattr(source, "start", None)
    return own(indices) if own else [functools.partial(source.__getitem__, i) for i in indices]


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


def in_order(source: Any, indices: Iterable[int]) -> Iterator[Callable[[], Any]]:
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


class Once(Generic[Chunk]):
    """A result that several threads wait for; the first of them to ask computes it.

    Args:
      wait: returns the result; called once, unless it raises.
    """

    def __init__(self, wait: Callable[[], Chunk]):
        self._wait: Callable[[], Chunk] | None = wait
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def __call__(self) -> Chunk:
        """Returns the result; raises the error of `wait` to all who ask."""
        with self._lock:
            if self._wait is not None:
                try:
                    self._result = self._wait()
                except Exception as error:
                    self._error = error
                self._wait = None
        if self._error is not None:
            raise self._error
        return self._result

    @property
    def failed(self) -> bool:
        """True if all who ask get an error."""
        return self._error is not None


class ChunkCache(Generic[Chunk]):
    """The chunks used last; each is read once, however many threads ask for it at a time.

    Args:
      start: begins to read a chunk by its number, and returns a function that waits for it.
      capacity: number of chunks held.
    """

    def __init__(self, start: Callable[[int], Callable[[], Chunk]], capacity: int):
        self._start = start
        self._capacity = capacity
        self._chunks: collections.OrderedDict[int, Once[Chunk]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def start(self, number: int) -> Once[Chunk]:
        """The chunk, read or about to be."""
        with self._lock:
            chunk = self._chunks.get(number)
            if chunk is None or chunk.failed:  # the next read may succeed
                chunk = self._chunks[number] = Once(self._start(number))
                if len(self._chunks) > self._capacity:
                    self._chunks.popitem(last=False)
            self._chunks.move_to_end(number)
        return chunk
