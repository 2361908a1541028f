"""The record of each start of a run: what it ran on, how far it came, where its time went, its end.

Each start owns a file in the workdir, which a thread renews. So of a start that was killed there is
the last sign of life. Within a start time is measured by a clock that does not jump.
"""

import contextlib
import json
import os
import platform
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from etils import epath

from clip_jax.common import commands, lifeline, starts
from clip_jax.errors import StorageError
from clip_jax.storage import locations, writing

_EVERY = 15.0  # seconds between two renewals
_LAST_WITHIN = 5.0  # seconds that the end of a run waits for its record
_MOST_EVENTS = 100  # in the record of a start
_PACKAGES = ("clip_jax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy")
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # and those that begin with JAX_


class Record:
    """One start of a run; on hosts other than the first it only measures.

    Attributes:
      number: number of the start, from 1.
      began_at: beginning of the start, UTC.
      phase: current phase, one of `starts.PHASES` but "data", which is part of "train".
    """

    def __init__(self, workdir: epath.PathLike, began: float):
        """Finds the number of the start; writes nothing yet.

        Args:
          workdir: local, gs:// or s3://.
          began: beginning of the start by `time.monotonic`.
        """
        self._directory = locations.parse(workdir) / starts.DIRECTORY
        self._writes = jax.process_index() == 0
        self.number = 1 + max(starts.numbers(self._directory), default=0) if self._writes else 0
        self.phase = "start"
        self._began = self._since = began
        self.began_at = datetime.now(UTC) - timedelta(seconds=time.monotonic() - began)
        self._seconds = dict.fromkeys(starts.PHASES, 0.0)
        self._facts: dict[str, Any] = {}
        self._from_step: int | None = None  # until it is known
        self._step = 0
        self._stepped = began
        self._waited = self._waited_before = 0.0  # in this stretch, and before its roll-back
        self._rollbacks: list[dict[str, int]] = []
        self._end: dict[str, Any] | None = None
        self._events: list[dict[str, Any]] = []
        self._changed = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="record", daemon=True)

    @contextlib.contextmanager
    def kept(self, **facts: Any) -> Iterator[None]:
        """Writes the record while its body runs, and how that ended.

        Args:
          facts: what is known of the start, JSON-serialisable.
        """
        self._facts = facts
        self._thread.start()
        with lifeline.on_end(self.end):
            try:
                yield
            except BaseException as error:
                self.end(*commands.ending(error))
                raise
            self.end(0, f"Finished at step {self._step:,}.")

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Counts the time of its body to a phase."""
        before = self._switch(phase)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, phase: str | None) -> str:
        """Counts the time so far; the next is that of `phase`, None: of the same as before."""
        with self._changed:
            now, before = time.monotonic(), self.phase
            self._seconds[before] += now - self._since
            self._since, self.phase = now, phase or before
        return before

    def seconds(self, waited: float = 0.0) -> dict[str, float]:
        """Returns the seconds of this start by phase.

        Args:
          waited: those of the training, since the last roll-back, that were spent waiting for data.
        """
        self._switch(None)  # by name, another thread might undo a switch of this moment
        found = dict(self._seconds)
        found["data"] = min(self._waited_before + waited, found["train"])
        found["train"] -= found["data"]
        return found

    def trained(self) -> float:
        """Returns the seconds of this start in training, those of waiting for data included."""
        self._switch(None)
        return self._seconds["train"]

    def begins(self, step: int) -> None:
        """Records the step that this start goes on from."""
        self._step = self._from_step = step
        self._stepped = time.monotonic()

    def reached(self, step: int, waited: float) -> None:
        """Records a step that the devices have finished, and the seconds waited for data so far."""
        self._step, self._waited, self._stepped = step, waited, time.monotonic()

    def went_back(self, from_step: int, to_step: int) -> None:
        """Records a roll-back, after which another feed brings the data."""
        self._rollbacks = [*self._rollbacks, {"from_step": from_step, "to_step": to_step}]
        self._waited_before += self._waited
        self.reached(to_step, 0.0)

    def add(self, step: int, text: str) -> None:
        """Records that something went wrong, or was mended."""
        event = {"time": self._now(), "step": step, "text": text}
        self._events = [*self._events, event][-_MOST_EVENTS:]

    def end(self, code: int, text: str) -> None:
        """Records the end, if it can be written soon; only the first call does."""
        if self._end is not None:
            return
        self._end = {"code": int(code), "reason": text}
        self._ended.set()
        self._thread.join(_LAST_WITHIN)

    def _renew(self) -> None:
        while self._writes:
            ended = self._ended.is_set()
            with contextlib.suppress(OSError, StorageError):  # the next one may succeed
                path = starts.path(self._directory, self.number)
                writing.write(path, json.dumps(self._described(), indent=1) + "\n")
            if ended:
                return
            self._ended.wait(_EVERY)

    def _now(self) -> str:
        return self._at(time.monotonic())

    def _at(self, monotonic: float) -> str:
        return (self.began_at + timedelta(seconds=monotonic - self._began)).isoformat()

    def _described(self) -> dict[str, Any]:
        seen = self._now()
        return {
            "start": self.number,
            "began": self.began_at.isoformat(),
            "seen": seen,
            "ended": seen if self._end else None,
            "end": self._end,
            "phase": self.phase,
            "stepped": self._at(self._stepped),
            "from_step": self._from_step,
            "step": None if self._from_step is None else self._step,
            "rollbacks": self._rollbacks,
            "seconds": self.seconds(self._waited),
            "events": self._events,
            **self._facts,
        }


def surroundings() -> dict[str, Any]:
    """Returns what a run was started with: code, packages and the variables that JAX reads."""
    packages = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    variables = {
        name: value
        for name, value in sorted(os.environ.items())
        if name in _VARIABLES or name.startswith("JAX_")
    }
    return {
        "revision": _revision(),
        "python": platform.python_version(),
        "packages": packages,
        "environment": variables,
    }


def _revision() -> str:
    """Returns the commit of the code, with "+" where files differ from it; "": not known.

    A launcher that unpacks an archive tells it by CLIP_JAX_REVISION.
    """
    if told := os.environ.get("CLIP_JAX_REVISION"):
        return told
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
