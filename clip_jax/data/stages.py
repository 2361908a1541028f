"""What each thread of the pipeline is doing, so that a hang can be named."""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

IDLE = "no thread is at work"


class _Work(NamedTuple):
    stage: str
    what: str
    since: float


class Stages:
    """The stage that each thread is in.

    Args:
      clock: of seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._now: dict[int, _Work] = {}

    def enter(self, stage: str, what: str) -> None:
        """Notes that the calling thread begins a stage, such as "reading" of "example 7"."""
        self._now[threading.get_ident()] = _Work(stage, what, self._clock())

    def leave(self) -> None:
        """Notes that the calling thread has nothing more to do."""
        self._now.pop(threading.get_ident(), None)

    def describe(self) -> str:
        """Who has been at what for how long, the longest first."""
        now = self._clock()
        work = sorted(self._now.copy().values(), key=lambda each: each.since)
        if not work:
            return IDLE
        shown = [f"{each.stage} {each.what} for {now - each.since:,.0f} s" for each in work[:5]]
        more = f", and {len(work) - 5} more threads" if len(work) > 5 else ""
        return "; ".join(shown) + more
