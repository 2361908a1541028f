"""Neighbours read at once, where storage is slow to jump about."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Run = TypeVar("Run")


class Once(Generic[Run]):
    """A result that the first to ask for waits for, on behalf of all.

    Args:
      wait: gives it; called once, unless it raises.
    """

    def __init__(self, wait: Callable[[], Run]):
        self._wait: Callable[[], Run] | None = wait
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def __call__(self) -> Run:
        """The result; what `wait` raised is raised to all."""
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


class ChunkCache(Generic[Run]):
    """The runs last asked for; each is read once, however many threads ask at a time.

    Args:
      start: begins to read a run by its number, and returns a function that waits for it.
      capacity: runs kept.
    """

    def __init__(self, start: Callable[[int], Callable[[], Run]], capacity: int):
        self._start = start
        self._capacity = capacity
        self._kept: OrderedDict[int, Once[Run]] = OrderedDict()
        self._lock = threading.Lock()

    def start(self, number: int) -> Once[Run]:
        """The run, read or about to be."""
        with self._lock:
            run = self._kept.get(number)
            if run is None or run.failed:  # the next one to ask may have more luck
                run = self._kept[number] = Once(self._start(number))
                if len(self._kept) > self._capacity:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(number)
        return run
