"""Commands by name, loaded on demand, with a common parser and common error messages."""

import argparse
import contextlib
import errno
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from clip_jax.common import lifeline, output
from clip_jax.errors import DataStalled, ExitCode, NotJoined, Stopped, StorageError, UserError

# Packages that only some sources of data and tokenizers need, by the module that they bring.
OPTIONAL = {
    "tensorflow": "tensorflow",
    "tensorflow_datasets": "tensorflow-datasets",
    "tensorflow_text": "tensorflow-text",
    "array_record": "array-record",
}

# As TensorStore and others word it, whose errors have no number.
_DISK_FULL = ("No space left on device", "Disk quota exceeded")
# In errors of collectives and of their set-up, between hosts that run.
_NETWORKS = ("Gloo", "NCCL", "DEADLINE_EXCEEDED", "UNAVAILABLE")

# Name: (module whose main(arguments) runs it, what it is for).
Table = Mapping[str, tuple[str, str]]


def dispatch(table: Table, arguments: list[str], prefix: str) -> None:
    """Runs the command that the first argument names, or lists all of them.

    Args:
      table: the commands.
      arguments: words of the command line behind `prefix`.
      prefix: words before the arguments, for the usage.
    """
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        with output.ends_unread():
            print(_usage(table, prefix))
    elif name in table:
        with output.ends_unread():
            importlib.import_module(table[name][0]).main(arguments[1:])
    else:
        print(
            f"There is no command {name!r}: choose one of {', '.join(table)}, or {prefix} --help.",
            file=sys.stderr,
        )
        sys.exit(ExitCode.USER_ERROR)


@contextlib.contextmanager
def plain_errors(
    interrupted: str = "Interrupted.", threads_may_hang: bool = False
) -> Iterator[None]:
    """Runs a command: an error ends the process with a paragraph and its `ExitCode`.

    Among several hosts the others end too, with the same code, and none ends well before all have.

    Args:
      interrupted: paragraph after Ctrl-C.
      threads_may_hang: whether to end without Python's own clean-up after a signal, a failure of
        storage or a stall of the data: threads that are then at work may never end, or crash in it.
    """
    try:
        with _none_lost():
            yield
        lifeline.finish()
    except KeyboardInterrupt:
        _end(interrupted, ExitCode.INTERRUPTED, threads_may_hang)
    except SystemExit as error:
        lifeline.fail(f"it ended with exit status {error.code}.", error.code)
        raise
    except Stopped as error:
        if error.everywhere:
            lifeline.finish()
        _end(str(error), error.exit_code, threads_may_hang and not error.everywhere)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and output.unread():
            lifeline.fail("Nobody reads its output any more.", ExitCode.UNREAD)
            raise
        if not isinstance(error, UserError):
            lifeline.await_news()  # it may come of another host's end
        code, text = ending(error)
        if code != ExitCode.FAULT:
            hangs = threads_may_hang and isinstance(error, DataStalled | StorageError)
            _end(text, code, hangs or isinstance(error, NotJoined))
        if not lifeline.joined():
            raise
        traceback.print_exc()
        _end(text, code, said=True)


@contextlib.contextmanager
def _none_lost() -> Iterator[None]:
    """Has an end that a signal's handler raised in vain raised once more, a moment later.

    A handler runs wherever the main thread is. Within a finalizer, or within a callback of the
    garbage collector, of which JAX has one, Python prints what is raised there, and goes on.
    """
    hook = sys.unraisablehook

    def again(lost: Any) -> None:
        error = lost.exc_value
        if not isinstance(error, KeyboardInterrupt | Stopped):
            hook(lost)
            return
        handler = signal.getsignal(signal.SIGINT)

        def end(*_: object) -> None:
            signal.signal(signal.SIGINT, handler)
            raise error

        signal.signal(signal.SIGINT, end)
        main = threading.main_thread().ident
        timer = threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT))
        timer.daemon = True
        timer.start()

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = hook


def ending(error: BaseException) -> tuple[ExitCode, str]:
    """Returns the exit code that an error ends a command with, and the paragraph on it."""
    if isinstance(error, UserError | Stopped):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED, "Ctrl-C."
    if isinstance(error, Exception) and (text := explained(error)):
        missing = isinstance(error, ModuleNotFoundError)
        return ExitCode.USER_ERROR if missing else ExitCode.RESUME, text
    return ExitCode.FAULT, f"{type(error).__name__}: {error}"


def _end(text: str, code: ExitCode, hangs: bool = False, said: bool = False) -> None:
    """Ends the process: says why, and tells the other hosts."""
    if not said:
        with contextlib.suppress(BrokenPipeError):
            print(f"\n{text}", file=sys.stderr, flush=True)
    lifeline.fail(text, code)
    if hangs:
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def explained(error: Exception) -> str:
    """Returns a paragraph on an error that is no fault of the program, "" on any other."""
    from clip_jax.storage import faults

    package = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package in OPTIONAL:
        return (
            f"This needs the package {OPTIONAL[package]}, which is not installed ({error}). "
            f"Run `pip install {OPTIONAL[package]}`."
        )
    return faults.explained(error) or _exhausted(error) or _cut_off(error)


def _cut_off(error: Exception) -> str:
    """Returns a paragraph on hosts that do not reach each other, "" on any other error.

    A host that has ended is told of by the others; this is for what the network does.
    """
    text = str(error)
    if type(error).__name__ != "JaxRuntimeError" or not any(name in text for name in _NETWORKS):
        return ""
    return (
        "The hosts of this run have lost touch with each other, or were too slow "
        f"({text.strip().splitlines()[0][:300]}). The same command, on all hosts, resumes at the "
        "last checkpoint. If it happens again, look at the network between the hosts, and whether "
        "one of them is overloaded."
    )


def _exhausted(error: Exception) -> str:
    """Returns a paragraph on a lack of memory or of space on a disk, "" on any other error."""
    text, number = str(error), getattr(error, "errno", None)
    detail = f"({(text.strip().splitlines() or [type(error).__name__])[0][:200]})"
    name = getattr(error, "filename", None)
    where = f" at {name}" if name else ""
    if number in (errno.ENOSPC, errno.EDQUOT) or any(s in text for s in _DISK_FULL):
        return (
            f"The disk is full{where} {detail}. Free some space, for a training run with a smaller "
            "--config.checkpoint.keep, and run the same command again; a training run resumes at "
            "its last complete checkpoint."
        )
    if number == errno.EFBIG:
        return (
            f"A file became larger than allowed{where} {detail}. Raise the limit (ulimit -f) or "
            "choose another disk, and run the same command again."
        )
    if number == errno.EROFS:
        return f"The disk is read-only{where} {detail}. Choose another directory, or remount it."
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        return (
            f"This host has no memory left {detail}. Close other programs, or take a smaller "
            "batch size, fewer --config.data.processes or a smaller --config.data.prefetch, and "
            "run the same command again."
        )
    if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and (
        "RESOURCE_EXHAUSTED" in text or "Out of memory" in text
    ):
        return (
            f"The device has no memory left {detail}. Take a smaller batch size or more devices; "
            "a training run also --config.accum_steps=8 or --config.model.remat=full, and it "
            "resumes at its last complete checkpoint. Other programs may also hold memory of the "
            "device."
        )
    return ""


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """Creates the parser of "python -m clip_jax COMMAND"; the description keeps its lines."""
    return argparse.ArgumentParser(
        prog=f"python -m clip_jax {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def at_least(lowest: int) -> Callable[[str], int]:
    """Makes a type for argparse: integers from `lowest` on."""

    def integer(text: str) -> int:
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text} is less than {lowest}")
        return int(text)

    return integer


def fraction(text: str) -> float:
    """A type for argparse: fractions from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def _usage(table: Table, prefix: str) -> str:
    width = max(map(len, table))
    lines = [f"  {name:<{width}} {purpose}" for name, (_, purpose) in table.items()]
    return "\n".join([f"{prefix} COMMAND [--help] ...", "", *lines])
