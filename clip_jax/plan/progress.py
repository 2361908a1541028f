"""Lines of progress during the stages of a plan, some of which take minutes."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from clip_jax.common.formatting import format_seconds

Report = Callable[[str], None]
# Seconds between lines.
INTERVAL = 20.0


@contextlib.contextmanager
def stage(name: str, report: Report | None) -> Iterator[None]:
    """Reports the begin of a stage, and again and again how long it takes so far.

    Args:
      name: description of the stage.
      report: called with each line, from another thread too; None: nothing is reported.
    """
    if report is None:
        yield
        return
    report(f"{name}.")
    began, done = time.monotonic(), threading.Event()

    def repeat() -> None:
        while not done.wait(INTERVAL):
            report(f"{name}: {format_seconds(time.monotonic() - began)} so far.")

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
