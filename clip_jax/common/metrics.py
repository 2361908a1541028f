"""The numbers of a run: metrics.jsonl, TensorBoard and other sinks, and the progress line."""

import json
import os
import pathlib
import socket
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath

from clip_jax.common import hosts
from clip_jax.common.formatting import format_seconds
from clip_jax.common.metric_rows import FILE, read_history
from clip_jax.storage import faults, locations, writing

EVALUATED = "eval/images_seen"  # in every row of an evaluation
_STARVED = 0.05  # fraction of the time waiting for data from which the progress line says so
_EVENTS_BUFFER = 2**22  # bytes of TensorBoard events that wait for space on the disk


class Sink(Protocol):
    """A place besides metrics.jsonl that rows are written to."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds one row."""

    def close(self) -> None:
        """Writes pending rows."""


class MetricWriter:
    """Appends rows of scalars to the workdir; only the first process writes."""

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        tensorboard: bool,
        start_step: int,
        evaluation_due: bool = False,
        sinks: Sequence[Sink] = (),
    ):
        """Opens the workdir.

        Args:
          workdir: local, gs:// or s3://.
          tensorboard: write TensorBoard events as well.
          start_step: rows of later steps are dropped: an interrupted run wrote them, and this one
            will write them again.
          evaluation_due: drop the evaluation of `start_step` as well, for the same reason.
          sinks: further places for the rows, on the first process.
        """
        self._sinks = list(sinks)
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        directory = locations.parse(workdir)
        self._files = writing.Growing(directory)
        self._path = self._files.local / FILE
        self._unwritten = b""  # rows for which the disk has no space
        rows = [
            row
            for row in read_history(directory)
            if row["step"] <= start_step - (evaluation_due and EVALUATED in row)
        ]
        # Replaced as a whole: a process that is killed here must not lose the rows of weeks.
        writing.write(epath.Path(self._path), "".join(json.dumps(row) + "\n" for row in rows))
        if tensorboard:
            events = directory / "tensorboard"
            if start_step == 0 and events.exists():
                events.rmtree()  # left by a run that ended before its first checkpoint
            self._sinks.append(TensorBoardWriter(self._files.local / "tensorboard"))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds one row; values are scalars."""
        if not self._writes:
            return
        row = {name: float(value) for name, value in metrics.items()}
        self._unwritten += json.dumps({"step": step, **row}).encode() + b"\n"
        try:
            for sink in self._sinks:
                sink.write(step, row)
            self._append()
        except OSError as error:  # a full disk: the next row may find space
            faults.record(f"{error.strerror} while logging", self._path)

    def _append(self) -> None:
        """Writes the pending rows; after a failure it goes on at the very byte."""
        with self._path.open("ab", buffering=0) as file:
            while self._unwritten:
                self._unwritten = self._unwritten[file.write(self._unwritten) :]

    def flush(self) -> None:
        """Writes pending rows to the workdir, which may be a bucket, if it can be reached."""
        if self._writes:
            self._files.flush()

    def close(self) -> None:
        """Writes pending rows; raises an error if the workdir cannot be reached."""
        if self._writes:
            self._append()
            for sink in self._sinks:
                sink.close()
            self._files.close()


class TensorBoardWriter:
    """Writes scalars to a new event file, without TensorFlow."""

    def __init__(self, directory: pathlib.Path):
        """Makes the directory, which is local, and the file."""
        # Imported late: a second that runs without TensorBoard need not wait.
        from tensorboard.compat.proto import event_pb2
        from tensorboard.plugins.scalar import summary_v2
        from tensorboard.summary.writer import record_writer

        messages: Any = event_pb2  # its classes are made at run time
        self._event = messages.Event
        self._summary = summary_v2.scalar_pb
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}.v2"
        # The buffer keeps what a full disk does not take, until it does.
        file = (directory / name).open("ab", buffering=_EVENTS_BUFFER)
        self._records = record_writer.RecordWriter(file)
        self._add(file_version="brain.Event:2")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends scalars, in one write for all of them."""
        for name, value in metrics.items():
            self._add(step=step, summary=self._summary(name, value))
        self._records.flush()

    def close(self) -> None:
        """Closes the file."""
        self._records.close()

    def _add(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())


class Progress:
    """The progress line: redrawn in place on a terminal, else one line at each update."""

    def __init__(self, start_step: int, total_steps: int, batch_size: int, seconds: float = 0.0):
        """Shows nothing yet.

        Args:
          start_step: step that training goes on from.
          total_steps: last step.
          batch_size: images per step.
          seconds: time in training so far, as `measure` takes it.
        """
        self._step = start_step
        self._total = total_steps
        self._batch_size = batch_size
        self._seconds, self._waited = seconds, 0.0
        self._live = sys.stdout.isatty()
        self._enabled = jax.process_index() == 0

    def measure(self, step: int, seconds: float, waited: float) -> tuple[float, float]:
        """Measures the speed since the last call.

        Args:
          step: now.
          seconds: time in training so far, without evaluations and checkpoints.
          waited: those of them that were spent waiting for data.

        Returns:
          Images per second, and the fraction of the time spent waiting.
        """
        passed, steps = max(seconds - self._seconds, 1e-9), step - self._step
        fraction = min((waited - self._waited) / passed, 1.0)
        self._seconds, self._step, self._waited = seconds, step, waited
        return steps * self._batch_size / passed, fraction

    def show(self, step: int, loss: float, rate: float, waited: float) -> None:
        """Shows step, loss, images/s, the time left, and the fraction waiting if it matters."""
        left = (self._total - step) * self._batch_size / max(rate, 1e-9)
        starved = f"  {waited:.0%} waiting for data" if waited >= _STARVED else ""
        self._print(
            f"step {step:,}/{self._total:,} {step / self._total:4.0%}  loss {loss:.3f}  "
            f"{rate:,.0f} images/s{starved}  ETA {format_seconds(left)}",
            end="\r" if self._live and step < self._total else "\n",
        )

    def note(self, text: str) -> None:
        """Shows a line that stays."""
        self._print(text, end="\n")

    def _print(self, text: str, end: str) -> None:
        if self._enabled:
            clear = "\x1b[2K" if self._live else ""
            print(clear + text, end=end, flush=True)


def sum_over_hosts(counts: Mapping[str, int]) -> dict[str, int]:
    """Sums counts by name over all hosts; every host must call it."""
    if jax.process_count() == 1:
        return dict(counts)
    total: Counter[str] = Counter()
    for text in hosts.gather(json.dumps(counts)):
        total.update(json.loads(text))
    return dict(total)


def fetch(metrics: Mapping[str, jax.Array]) -> dict[str, float]:
    """Waits for replicated device scalars and brings them to the host."""
    return {name: np.asarray(value.addressable_data(0)).item() for name, value in metrics.items()}
