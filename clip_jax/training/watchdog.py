"""The watchdog of a run: when no step ends for long, it says what each host was doing, and ends it.

It is a thread that looks once a second for signs of life: the loop has come round to another step,
an evaluation to another batch, or the run to another phase. A host in a phase that may take longer,
such as an evaluation, is not held up, and neither are those that wait for it in a collective. So
before it ends anything, the first host asks all others.

Seconds in which the whole process was stopped (Ctrl-Z, a suspended machine) do not count.
"""

import contextlib
import faulthandler
import os
import pathlib
import re
import select
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jax
from etils import epath

from clip_jax.common import formatting, lifeline
from clip_jax.errors import ExitCode, StorageError
from clip_jax.storage import locations, remote, writing

DIRECTORY = "stalls"  # inside the workdir

_LONGER = 6  # times the limit of a step, that of an evaluation or a save without a sign of life
_TICK = 1.0  # seconds
_STOP = b"\0"  # no number of a signal
_MOST_OF_A_TICK = 10.0  # seconds that count of those between two ticks
_WRITE_WITHIN = 10.0  # seconds
_END_WITHIN = 60.0  # seconds
_FRAMES = 16  # innermost ones shown of a stack
_OWN = {
    "watchdog",
    "lease",
    "lifeline",
    "record",
    "report",
    "checkpoint watch",
}  # threads not shown
_ROOT = pathlib.Path(__file__).parents[2]  # of the package's folder

Report = Mapping[str, Any]  # what a host was doing, as JSON


class Watchdog:
    """Watches the steps of one host, with those of the others."""

    def __init__(
        self,
        limit: float,
        more: Mapping[str, float],
        phase: Callable[[], str],
        pipeline: Callable[[], str],
        directory: epath.PathLike,
    ):
        """Starts nothing yet.

        Args:
          limit: seconds without a step after which the run ends; 0: none.
          more: seconds that some phases may take in addition.
          phase: returns the phase of this host: "train", "data", "checkpoint", "evaluation".
          pipeline: describes the state of the data.
          directory: the workdir, for the reports of all hosts.
        """
        self._usual, self._more = limit, more
        self._phase, self._pipeline = phase, pipeline
        self._directory = locations.parse(directory) / DIRECTORY
        self._step, self._beats = 0, 0
        self._quiet = 0.0  # seconds without a sign of life
        self._ask_at = 0.0  # of them, when to ask the other hosts again
        self._complained = threading.Event()
        self._described = False  # at the end, by this host itself
        self._main = threading.current_thread().ident
        self._host = jax.process_index()

    def beat(self, step: int | None = None) -> None:
        """Gives a sign of life; with a step, where that begins."""
        self._beats += 1
        self._step = self._step if step is None else step

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches while its body runs; SIGUSR1 prints what this host is doing."""
        with (
            _signals() as (signals, wake),
            lifeline.reporting(self.report, self._complained.set),
            lifeline.on_end(self._print_at_end),
        ):
            thread = threading.Thread(
                target=self._watch, args=(signals,), name="watchdog", daemon=True
            )
            thread.start()
            try:
                yield
            finally:
                os.write(wake, _STOP)
                thread.join(_END_WITHIN)  # it may be asking the others, and its pipe is closed next

    def report(self) -> dict[str, Any]:
        """Returns what this host is doing."""
        phase = self._phase()
        return {
            "name": socket.gethostname(),
            "pid": os.getpid(),
            "step": self._step,
            "phase": phase,
            "quiet": self._quiet,
            # Hosts come to a standstill at about the same time.
            "overdue": 0 < 0.9 * self._limit(phase) < self._quiet,
            "pipeline": self._describe_pipeline(),
            "stacks": _stacks(self._main),
        }

    def _describe_pipeline(self) -> str:
        try:
            return self._pipeline()
        except Exception as error:  # it may be about to end
            return f"not known ({error})"

    def _limit(self, phase: str) -> float:
        """Returns the seconds without a sign of life that a phase may take; 0: any number."""
        if not self._usual:
            return 0.0
        times = 1 if phase in ("train", "data") else _LONGER
        return times * self._usual + self._more.get(phase, 0.0)

    def _watch(self, signals: int) -> None:
        seen: tuple[Any, ...] = ()
        before = time.monotonic()
        while True:
            ready, _, _ = select.select([signals], [], [], _TICK)
            received = os.read(signals, 1000) if ready else b""
            if _STOP[0] in received:
                return
            if signal.SIGUSR1 in received:
                print(f"\n{describe({self._host: self.report()})}", file=sys.stderr, flush=True)
            now = time.monotonic()
            self._quiet += min(now - before, _MOST_OF_A_TICK)
            before = now
            signs = self._phase(), self._beats
            if signs != seen:
                seen, self._quiet, self._ask_at = signs, 0.0, 0.0
            limit = self._limit(signs[0])
            overdue = limit and self._quiet > max(limit, self._ask_at)
            if overdue or self._complained.is_set():
                self._judge(limit)

    def _judge(self, limit: float) -> None:
        """Ends all hosts, unless one of them is at work that may take longer."""
        self._complained.clear()
        others = lifeline.connected()
        reports: Mapping[int, Report] = {self._host: self.report()}
        silent: Sequence[int] = []
        if others is not None and self._host:
            if others.complain():
                self._ask_at = self._quiet + max(limit / 10, _TICK)
                return
            silent = [0]
        elif others is not None:
            reports, silent = others.collect()
            busy = [host for host, report in reports.items() if not report.get("overdue")]
            if busy:
                others.reassure()
                if 0 not in busy and not self._ask_at:
                    quiet = formatting.format_seconds(self._quiet)
                    places = _places(reports, busy)
                    print(f"\nNo step for {quiet}; still waiting for {places}.", flush=True)
                self._ask_at = self._quiet + max(limit / 10, _TICK)
                return
        self._end(reports, silent)

    def _end(self, reports: Mapping[int, Report], silent: Sequence[int]) -> None:
        timer = threading.Timer(_END_WITHIN, os._exit, (ExitCode.RESUME,))  # if the rest hangs
        timer.daemon = True
        timer.start()
        self._described = True
        text = verdict(reports, silent)
        path = self._directory / f"{datetime.now():%Y-%m-%dT%H-%M-%S}-host{self._host}.txt"
        several = len(reports) > 1
        print(f"\n{describe(reports, main_alone=several)}", file=sys.stderr, flush=True)
        full = f"{text}\n\n{describe(reports)}\n"
        thread = threading.Thread(target=_write, args=(path, full), name="report", daemon=True)
        thread.start()
        thread.join(_WRITE_WITHIN)
        if several and thread.is_alive():
            print(f"\n{path} cannot be written.\n{describe(reports)}", file=sys.stderr, flush=True)
        lifeline.end(f"{text} The stacks of all threads are in {path}.", ExitCode.RESUME)

    def _print_at_end(self, code: int, text: str) -> None:
        """Prints what this host was doing, where the first one ends it since the run hangs."""
        del code, text
        report = self.report()
        if report["overdue"] and not self._described:
            print(f"\n{describe({self._host: report})}", file=sys.stderr, flush=True)


def verdict(reports: Mapping[int, Report], silent: Sequence[int]) -> str:
    """Returns sentences about a run that hangs: where each host is, and which ones differ.

    Args:
      reports: by host, of those that answer.
      silent: the others.
    """
    quiet = formatting.format_seconds(min(report["quiet"] for report in reports.values()))
    suspects = sorted([*silent, *_suspects(reports)])
    if suspects:
        hint = f"See to {_hosts(suspects)} first."
    elif len(reports) > 1:
        hint = "All hosts are at the same place: a device, or the network between them, hangs."
    else:
        hint = "Its stacks show where it hangs."
    places = _places(reports, reports)
    if silent:
        places += f"; no answer from {_hosts(silent)}, as if frozen or gone"
    return (
        f"No step has ended for {quiet} (step.timeout), so the run ends, and the same command "
        f"resumes at the last checkpoint. {places[0].upper()}{places[1:]}. {hint}"
    )


def _suspects(reports: Mapping[int, Report]) -> list[int]:
    """Returns the hosts that the others seem to wait for."""
    in_step = [host for host, report in reports.items() if report["phase"] == "train"]
    if 0 < len(in_step) < len(reports):
        return [host for host in reports if host not in in_step]
    least = min(report["step"] for report in reports.values())
    behind = [host for host, report in reports.items() if report["step"] == least]
    return behind if len(behind) < len(reports) else []


_PLACES = {
    "train": "in step {step:,} (the devices, or a collective of all hosts)",
    "data": "waiting for data after step {step:,}",
    "checkpoint": "saving a checkpoint after step {step:,}",
    "evaluation": "evaluating after step {step:,}",
}


def _place(report: Report) -> str:
    if not report:
        return "not training yet, or no longer"
    return _PLACES.get(report["phase"], "{phase}").format(**report)


def _places(reports: Mapping[int, Report], hosts: Iterable[int]) -> str:
    """Lists the places of hosts: "hosts 0, 1: in step 7; host 2: waiting for data"."""
    by_place: dict[str, list[int]] = {}
    for host in hosts:
        by_place.setdefault(_place(reports[host]), []).append(host)
    return "; ".join(f"{_hosts(group)}: {place}" for place, group in by_place.items())


def _hosts(numbers: Sequence[int]) -> str:
    return f"host{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def describe(reports: Mapping[int, Report], main_alone: bool = False) -> str:
    """Returns reports as text.

    Args:
      reports: by host.
      main_alone: whether to leave out all threads but the main ones.
    """
    lines = []
    for host, report in reports.items():
        seconds = formatting.format_seconds(report["quiet"])
        lines += [
            f"Host {host} ({report['name']}, process {report['pid']}), {_place(report)} for "
            f"{seconds}. Data: {report['pipeline']}."
        ]
        if not main_alone:
            lines += _stack_lines(report["stacks"])
    stacks: dict[str, list[int]] = {}
    for host, report in reports.items() if main_alone else ():
        stacks.setdefault("\n".join(_stack_lines(report["stacks"][:1])), []).append(host)
    for text, group in stacks.items():
        lines += [f"Stack on {_hosts(group)}:", text]
    return "\n".join(lines)


def _stack_lines(stacks: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for each in stacks:
        names = ", ".join(f"{name} x {n}" if n > 1 else name for name, n in each["threads"])
        lines += [f"  {names}:", *(f"    {frame}" for frame in each["frames"])]
    return lines


def _stacks(main: int | None) -> list[dict[str, Any]]:
    """Returns the stacks of this process's threads, outermost frames first; the main one leads.

    Equal ones are listed once. Left out are the threads of the trainer's own upkeep, and idle ones
    of pools.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found: dict[tuple[str, ...], Counter[str]] = {}
    frames = sys._current_frames()
    for ident in sorted(frames, key=lambda ident: ident != main):
        name = re.sub(r"[-_ ]?\d+( \(.*\))?$", "", names.get(ident, "not of Python"))
        frame, shown = frames[ident], []
        while frame is not None and len(shown) < _FRAMES:
            code = frame.f_code
            if not code.co_filename.endswith("/threading.py"):
                shown.append(f"{_short(code.co_filename)}:{frame.f_lineno} in {code.co_name}")
            frame = frame.f_back
        if name in _OWN or not shown or shown[0].endswith("in _worker"):
            continue
        found.setdefault(tuple(shown[::-1]), Counter())[
            "main thread" if ident == main else name
        ] += 1
    return [{"threads": list(n.items()), "frames": list(key)} for key, n in found.items()]


def _short(path: str) -> str:
    """Returns a path from the package on."""
    for folder in ("/site-packages/", f"/python{sys.version_info[0]}.{sys.version_info[1]}/"):
        path = path.rpartition(folder)[2]
    return path.removeprefix(f"{_ROOT}/")


def _write(path: epath.Path, text: str) -> None:
    with contextlib.suppress(OSError, StorageError):
        if not remote.is_remote(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        writing.write(path, text)


@contextlib.contextmanager
def _signals() -> Iterator[tuple[int, int]]:
    """Yields both ends of a pipe that gets a byte at each signal, even if the main thread hangs."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    if threading.current_thread() is not threading.main_thread():
        yield read, write
        return
    at_start = faulthandler.unregister(signal.SIGUSR1)
    handler = signal.signal(signal.SIGUSR1, lambda *_: None)
    descriptor = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield read, write
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGUSR1, handler)
        if at_start:
            faulthandler.register(signal.SIGUSR1)
        os.close(read)
        os.close(write)
