"""Neighbours read at once, where storage is slow to jump about."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent import futures
from typing import Generic, TypeVar

Run = TypeVar("Run")


class RunCache(Generic[Run]):
    """The runs last asked for; each is read once, however many threads ask at a time.

    Args:
      read: reads a run by its number; what it raises, all who wait for it get.
      capacity: runs kept.
    """

    def __init__(self, read: Callable[[int], Run], capacity: int):
        self._read = read
        self._capacity = capacity
        self._kept: OrderedDict[int, futures.Future[Run]] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, number: int) -> Run:
        with self._lock:
            future = self._kept.get(number)
            missing = future is None
            if future is None:
                future = self._kept[number] = futures.Future()
                if len(self._kept) > self._capacity:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(number)
        if missing:
            self._fill(number, future)
        return future.result()

    def _fill(self, number: int, future: "futures.Future[Run]") -> None:
        try:
            future.set_result(self._read(number))
        except Exception as error:
            with self._lock:
                self._kept.pop(number, None)  # the next one to ask may have more luck
            future.set_exception(error)
