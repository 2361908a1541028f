"""Standard output whose reader goes away: `head` that has seen enough, a `tee` that was killed.

A command whose output is its result has nothing left to do then, and ends as by SIGPIPE. A training
run must not be lost with its log: it drops what cannot be written, be the pipe closed, the terminal
gone or the disk of the log full. Its metrics are in the workdir.
"""

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator

from clip_jax.errors import ExitCode

_STDOUT, _STDERR = 1, 2

_news: list[str] = []  # what nobody has taken yet
_failed = False


def unread() -> list[int]:
    """Returns which of standard output and error is a pipe that nobody reads any more."""
    states = select.poll()
    for descriptor in (_STDOUT, _STDERR):
        states.register(descriptor, 0)
    return [place for place, state in states.poll(0) if state & (select.POLLERR | select.POLLHUP)]


@contextlib.contextmanager
def ends_unread() -> Iterator[None]:
    """Ends the process without a word once nobody reads what its body prints."""
    try:
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:  # closed from the start
                    stream.flush()  # at the end of the interpreter it is too late
    except BrokenPipeError:
        if not (broken := unread()):  # another pipe, or a socket
            raise
        for descriptor in broken:  # what is left is flushed there
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        sys.exit(ExitCode.UNREAD)


@contextlib.contextmanager
def outlived() -> Iterator[None]:
    """Runs its body to the end, whatever becomes of standard output and standard error.

    `take_news` tells of what was dropped.
    """
    before = sys.stdout, sys.stderr
    if sys.stdout is sys.__stdout__:  # else somebody captures it
        sys.stdout = _outliving(_STDOUT, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _outliving(_STDERR, sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before


def take_news() -> str:
    """Returns a sentence on output that could not be written, once; "": there is none."""
    return _news.pop() if _news else ""


def _outliving(descriptor: int, stream: io.TextIOWrapper | None) -> io.TextIOWrapper:
    """Returns a stream that writes to a descriptor, in place of another; None: that was closed."""
    if stream is None:
        return open(os.devnull, "w")
    with contextlib.suppress(OSError):
        stream.flush()
    raw = io.BufferedWriter(_Descriptor(descriptor, "w", closefd=False))
    return io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True)


class _Descriptor(io.FileIO):
    """A file descriptor that takes everything, and drops what cannot be written."""

    def write(self, data) -> int:
        try:
            if (written := super().write(data)) is not None:
                return written
            _fail(self.fileno(), "its reader is too slow")  # a pipe that does not wait
        except OSError as error:
            _fail(self.fileno(), error.strerror or str(error))
        return len(data)


def _fail(descriptor: int, reason: str) -> None:
    global _failed
    if _failed:
        return
    _failed = True
    name = "Standard output" if descriptor == _STDOUT else "Standard error"
    _news.append(
        f"{name} cannot be written ({reason}). Training goes on, and metrics.jsonl has the numbers."
    )
    if descriptor == _STDOUT:
        with contextlib.suppress(OSError):
            os.write(_STDERR, f"\n{_news[0]} Ctrl-C saves and ends.\n".encode())
