"""The start of a worker process: signals, and the death of its parent."""

import multiprocessing
import os
import signal
import threading


def begin() -> None:
    """Prepares a worker process.

    It leaves Ctrl-C to the parent, which ends its workers, and ends when the parent is killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
