"""Experiment trackers: Weights & Biases, MLflow and Trackio, each in a process of its own.

A tracker may be down, hang, leak, or take the process with it: nothing of it runs in the trainer,
which writes rows to a pipe and never waits. `tracker_process` is the other end.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from clip_jax.errors import UserError

_KEPT = 10_000  # rows that wait for a tracker which takes none; beyond that the oldest are dropped
_CLOSE_TIMEOUT = 30.0  # seconds for the last rows of all trackers at the end of a run
# The trainer's own path: it need not have been started from the folder that clip_jax lies in.
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from clip_jax.common import tracker_process; tracker_process.main()"
)


def parse(names: str) -> list[str]:
    """Splits `config.log.trackers`.

    Raises:
      UserError: one of them is not installed.
    """
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"log.trackers names {name}, which is not installed. Run `pip install {name}`, or "
                "leave it out of --config.log.trackers."
            )
    return found


class Trackers:
    """The trackers of a run; a sink of `metrics.MetricWriter`."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        workdir: epath.Path,
        project: str,
        start_step: int,
        went_back: bool,
        config: Mapping[str, Any],
        hardware: str,
        say: Callable[[str], None],
    ):
        """Starts their processes.

        Args:
          names: some of `choices.TRACKERS`, installed.
          workdir: keeps the run's id there and the rows sent; rows up to `start_step` that a
            tracker has not got are read from its metrics.jsonl.
          project: project, of MLflow the experiment.
          start_step: step that the run resumes from.
          went_back: whether it has gone back there, to train later steps again on other data: their
            rows are sent although the tracker has such.
          config: settings by dotted name.
          hardware: number and kind of the devices.
          say: shows a sentence to the user.
        """
        about = {
            "workdir": os.fspath(workdir),
            "project": project,
            "start_step": start_step,
            "went_back": went_back,
            "config": dict(config),
            "hardware": hardware,
        }
        self._trackers = [_Tracker({"tracker": name, **about}, say) for name in names]

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hands a row to every tracker, without waiting."""
        for tracker in self._trackers:
            tracker.put({"step": step, **metrics})

    def close(self) -> None:
        """Waits until the trackers have got all rows, but not for long."""
        deadline = time.monotonic() + _CLOSE_TIMEOUT
        for tracker in self._trackers:
            tracker.put("end")
        for tracker in self._trackers:
            tracker.close(deadline)


class _Tracker:
    """One tracker's process, and the lines that it has not taken yet."""

    def __init__(self, about: Mapping[str, Any], say: Callable[[str], None]):
        self._name, self._say = about["tracker"], say
        self._lines: deque[bytes] = deque()
        self._begun = b""  # a line of which the pipe has taken a part
        self._dropped, self._ended = 0, False
        self._heard = b""
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the trainer, which then tells
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        for pipe in (self._stdin, self._stdout):
            os.set_blocking(pipe.fileno(), False)
        self.put(about)

    def put(self, value: Any) -> None:
        """Adds a line, and writes as much as the pipe takes."""
        if self._ended:
            self._dropped += 1
            return
        self._lines.append(json.dumps(value).encode() + b"\n")
        if len(self._lines) > _KEPT:
            self._lines.popleft()
            self._dropped += 1
            if self._dropped == 1:
                self._say(
                    f"{self._name} has not taken {_KEPT:,} rows: the oldest are left out there, "
                    "until the next start of this run. metrics.jsonl has them all."
                )
        self._pump()

    def _pump(self) -> None:
        self._listen()
        try:
            while self._begun or self._lines:
                self._begun = self._begun or self._lines.popleft()
                self._begun = self._begun[os.write(self._stdin.fileno(), self._begun) :]
        except BlockingIOError:
            pass
        except OSError:
            self._end(f"{self._name} is no longer written to: its process has ended.")

    def _listen(self) -> None:
        """Shows what the process says."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._stdout.fileno(), 1 << 16):
                self._heard += data
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            self._say(line.decode(errors="replace"))

    def _end(self, reason: str) -> None:
        self._ended = True
        self._begun = b""
        self._lines.clear()
        self._say(f"{reason} Training goes on; the next start of this run sends what is missing.")

    def close(self, deadline: float) -> None:
        """Waits until the process has ended, at most to the deadline; then kills it."""
        while not self._ended and (self._begun or self._lines):
            self._pump()
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        with contextlib.suppress(OSError):
            self._stdin.close()
        try:
            self._process.wait(max(deadline - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._say(
                f"{self._name} has not taken all rows within {_CLOSE_TIMEOUT:.0f} s. The same "
                "command, started again, sends what is missing."
            )
        self._listen()
        self._stdout.close()
