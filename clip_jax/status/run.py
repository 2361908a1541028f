"""A run as its workdir shows it: what it is doing, and why not more."""

import dataclasses
import enum
import functools
import itertools
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from etils import epath

from clip_jax.common import goodput, metric_rows, starts
from clip_jax.common.formatting import format_seconds
from clip_jax.common.goodput import Account
from clip_jax.common.starts import Start
from clip_jax.errors import ExitCode, UserError
from clip_jax.storage import faults, locations, ranges, remote
from clip_jax.training import lease

SILENT = lease.EXPIRES  # seconds without a sign of life after which a run is dead
WATCH = 25.0  # seconds in which a run that lives gives one, by any clock
_STUCK = 120.0  # seconds without a step that are no stall yet, however fast the steps
_STUCK_STEPS, _STUCK_INTERVALS = 20, 4  # likewise, in steps and in intervals of the log
_LONG = 1800.0  # seconds without a step: an evaluation, a save or a compilation may take as long
_RECENT = 20  # rows of metrics over which speed is a median
_COMPLETE = "commit_success.txt"  # in a checkpoint of a bucket, which has no renames


class State(enum.StrEnum):
    """The state of a run."""

    STARTING = "starting"  # alive, before its first step
    RUNNING = "running"
    STALLED = "stalled"  # alive, without a step for long
    STOPPED = "stopped"  # it ended before its time, and said why
    DEAD = "dead"  # no end, and no sign of life
    FINISHED = "finished"
    UNCLEAR = "unclear"  # its last sign of life is in the future
    UNREADABLE = "unreadable"


LIVE = (State.STARTING, State.RUNNING, State.STALLED)
WELL = (State.STARTING, State.RUNNING, State.FINISHED)


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run.

    Attributes:
      steps: complete ones, ascending.
      best: step of the best; None: not known.
      metric: the metric by which it is the best.
      value: value of the metric there.
    """

    steps: Sequence[int] = ()
    best: int | None = None
    metric: str = ""
    value: float = math.nan


@dataclasses.dataclass(frozen=True)
class Run:
    """A run at one moment.

    Attributes:
      name: workdir as the user typed it.
      now: time of this look.
      fresh: time of the first look that found the same signs of life.
      starts: records of its starts, in order.
      account: their sums.
      holder: holder of the lease; None: there is none.
      alive: whether a process of the run lives; None: not known.
      rows: rows of metrics.jsonl.
      checkpoints: the checkpoints that are there.
      config: the resolved config, flat by dotted name; {}: there is none.
      reported: whether report.html is there, which a run writes at its end.
      remarks: a sentence about each thing that is missing, damaged or uncertain.
      error: why the workdir cannot be read; None: it can.
    """

    name: str
    now: datetime
    fresh: datetime
    starts: Sequence[Start] = ()
    account: Account = dataclasses.field(default_factory=lambda: goodput.account([]))
    holder: lease.Holder | None = None
    alive: bool | None = False
    rows: Sequence[Mapping[str, float]] = ()
    checkpoints: Checkpoints = Checkpoints()
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reported: bool = False
    remarks: Sequence[str] = ()
    error: UserError | None = None

    @property
    def last(self) -> Start | None:
        """The last start."""
        return self.starts[-1] if self.starts else None

    @functools.cached_property
    def step(self) -> int | None:
        """The last step known; None: there is none."""
        found = [start.step for start in self.starts[::-1] if start.step is not None][:1]
        # The record is some seconds old. Rows that a later start repeats are dropped at its start.
        return max([*found, *(int(row["step"]) for row in self.rows)], default=None)

    @functools.cached_property
    def latest(self) -> dict[str, tuple[int, float]]:
        """The last value of every metric with its step, in the order of their first rows."""
        names: dict[str, float] = {}
        for row in self.rows:
            names |= row
        found: dict[str, tuple[int, float]] = {}
        for row in reversed(self.rows):
            found |= {n: (int(row["step"]), float(row[n])) for n in row.keys() - found.keys()}
        return {name: found[name] for name in names}

    @property
    def total(self) -> int | None:
        """The number of steps of the whole run; None: not known."""
        for start in self.starts[::-1]:
            if start.total_steps is not None:
                return start.total_steps
        number, _, unit = str(self.config.get("duration", "")).partition(" ")
        return int(number) if number.isdecimal() and unit.startswith("step") else None

    @property
    def silent(self) -> float | None:
        """Seconds since the last sign of life; negative: it is in the future."""
        return (self.now - self.last.seen).total_seconds() if self.last else None

    @property
    def since_step(self) -> float | None:
        """Seconds from the last step to the last sign of life; None: not known."""
        last = self.last
        if last is None or last.stepped is None:
            return None
        return max(0.0, (last.seen - last.stepped).total_seconds())

    def lives(self, start: Start) -> bool:
        """Returns whether a start still runs."""
        return start is self.last and state(self) in LIVE

    def recent(self, name: str) -> float:
        """Returns the median of a metric over the last rows that have it; NaN: none has."""
        finite = (
            row[name] for row in reversed(self.rows) if math.isfinite(row.get(name, math.nan))
        )
        found = list(itertools.islice(finite, _RECENT))
        return statistics.median(found) if found else math.nan

    @property
    def left(self) -> float | None:
        """Seconds to the end at the pace of the last start that trained; None: not known."""
        for start in self.starts[::-1]:
            if start.trained and self.total is not None and self.step is not None:
                busy = sum(start.seconds.get(name, 0.0) for name in _BUSY)
                return max(0, self.total - self.step) * busy / start.trained
        return None


_BUSY = ("train", "data", "checkpoint", "evaluation")


# ---- Reading -----------------------------------------------------------------------------------


def look(name: str, now: datetime | None = None, before: Run | None = None) -> Run:
    """Reads a workdir.

    Args:
      name: workdir: local, gs:// or s3://.
      now: time; None: the time now.
      before: an earlier look: what has changed since then tells that the run lives.

    Returns:
      The run; with `error` where it cannot be read.
    """
    now = now or datetime.now(UTC)
    try:
        return _look(name, now, before)
    except UserError as error:
        return Run(name, now, now, error=error)
    except OSError as error:
        return Run(name, now, now, error=UserError(f"{name} cannot be read: {error}."))


def _look(name: str, now: datetime, before: Run | None) -> Run:
    if not name:
        raise UserError("A WORKDIR is empty. Is a variable of the shell not set?")
    workdir = locations.reachable(name)
    if not remote.is_remote(workdir) and not workdir.is_dir():
        there = "is a file" if workdir.exists() else "is no directory"
        raise UserError(f"{name} {there}. Give the --workdir of a run, or several.")
    found, remarks = starts.read(workdir)
    account = goodput.account(found)
    rows, dropped = metric_rows.read(workdir)
    config, config_remarks = _config(workdir)
    metric = config.get("checkpoint.best_metric")
    holder = lease.read(workdir)
    if not (found or rows or config or holder or remarks):
        raise UserError(_no_run(name, workdir))
    remarks = [*remarks, *account.remarks, *config_remarks]
    if not found:
        remarks.append(
            "It has no records of its starts, which runs of an earlier version do not write: "
            "neither their times nor why they ended are known."
        )
    if dropped:
        remarks.append(
            f"{dropped:,} of {len(rows) + dropped:,} lines of {metric_rows.FILE} are left out: "
            "they are cut short, or no row of numbers with a step."
        )
    run = Run(
        name=name,
        now=now,
        fresh=now,
        starts=found,
        account=account,
        holder=holder,
        rows=rows,
        checkpoints=_checkpoints(workdir, rows, metric if isinstance(metric, str) else ""),
        config=config,
        reported=locations.stat(workdir / "report.html") is not None,
        remarks=remarks,
    )
    if before is not None and (before.holder, before.last) == (run.holder, run.last):
        run = dataclasses.replace(run, fresh=before.fresh)
    return dataclasses.replace(run, alive=_alive(run, workdir, before))


def _no_run(name: str, workdir: epath.Path) -> str:
    if not remote.is_remote(workdir):
        inner = sorted(path.parent.name for path in workdir.glob("*/config.json"))
        if len(inner) == 1:
            return f"{name} is no workdir of a run, but holds one: {os.path.join(name, inner[0])}."
        if inner:
            return (
                f"{name} is no workdir of a run, but holds {len(inner)}: give "
                f"{os.path.join(name, '*')}, or some of {', '.join(inner[:10])}."
            )
    return (
        f"{name} holds no run: neither {starts.DIRECTORY}/ nor {metric_rows.FILE} nor config.json. "
        "Give the --workdir of a run, or several."
    )


def _config(workdir: epath.Path) -> tuple[dict[str, Any], list[str]]:
    """Reads the resolved config, flat by dotted name, and a sentence where it is damaged."""
    path = workdir / "config.json"
    try:
        found = json.loads(ranges.read(path))
        if not isinstance(found, dict):
            raise ValueError
        return _flat(found), []
    except FileNotFoundError:
        return {}, []
    except (ValueError, RecursionError):
        return {}, ["config.json is left out, since it is damaged."]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat


def _checkpoints(
    workdir: epath.Path, rows: Sequence[Mapping[str, float]], metric: str
) -> Checkpoints:
    folder = workdir / "checkpoints"
    try:
        names = faults.repeat(lambda: [path.name for path in folder.iterdir()], folder)
    except (FileNotFoundError, NotADirectoryError):
        return Checkpoints()
    found = sorted(int(name) for name in names if name.isascii() and name.isdecimal())
    if remote.is_remote(workdir):
        marks = locations.stats([folder / str(step) / _COMPLETE for step in found])
        found = [step for step, mark in zip(found, marks) if mark is not None]
    there = set(found)
    scores = {int(row["step"]): row[metric] for row in rows if metric in row}
    scores = {step: value for step, value in scores.items() if step in there}
    scores = {step: value for step, value in scores.items() if math.isfinite(value)}
    best = max(scores, key=lambda step: scores[step], default=None)
    return Checkpoints(found, best, metric, math.nan if best is None else scores[best])


# ---- Judgement ---------------------------------------------------------------------------------


def _alive(run: Run, workdir: epath.Path, before: Run | None) -> bool | None:
    """Returns whether a process of the run lives; None: its clock and this one differ."""
    if run.holder is not None and (here := lease.lives(run.holder)) is not None:
        return here
    ended = run.last is not None and run.last.code is not None
    ages = [] if run.silent is None or ended else [run.silent]
    if run.holder is not None and not remote.is_remote(workdir):
        stat = locations.stat(workdir / lease.FILE)
        ages += [] if stat is None else [run.now.timestamp() - int(stat.version) / 1e9]
    if ages and min(ages) >= -SILENT:
        return min(ages) <= SILENT
    if not ages and run.holder is None:
        return False
    if before is None:
        return None
    if run.fresh != before.fresh:
        return True
    return False if (run.now - run.fresh).total_seconds() >= WATCH else before.alive


def state(run: Run) -> State:
    """Returns the state of a run."""
    if run.error is not None:
        return State.UNREADABLE
    last = run.last
    if run.alive is None:
        return State.UNCLEAR
    if not run.alive:
        if last is None:
            return State.FINISHED if run.reported else State.STOPPED
        if last.code is None:
            return State.DEAD
        return State.FINISHED if last.code == ExitCode.DONE else State.STOPPED
    if last is None:
        return State.RUNNING if run.rows else State.STARTING
    if last.code is not None:  # another start holds the lease, and has not written yet
        return State.STARTING
    if not last.trained:
        return State.STALLED if last.duration > _LONG else State.STARTING
    return State.STALLED if (run.since_step or 0.0) > _patience(run, last) else State.RUNNING


def _patience(run: Run, last: Start) -> float:
    """Returns the seconds without a step after which a run is stalled."""
    if last.phase not in ("", "train", "data"):
        return _LONG
    busy = last.seconds.get("train", 0.0) + last.seconds.get("data", 0.0) - (run.since_step or 0.0)
    pace = max(0.0, busy) / max(1, last.trained)
    # A run records the steps that it logs.
    steps = (int(row["step"]) for row in reversed(run.rows) if "train/loss" in row)
    logged = list(itertools.islice(steps, 2))
    interval = logged[0] - logged[1] if len(logged) == 2 else 0
    return max(_STUCK, pace * max(_STUCK_STEPS, _STUCK_INTERVALS * interval))


def sentence(run: Run) -> str:
    """Returns a sentence on the state: what happened, with time and reason."""
    last, now = run.last, state(run)
    if run.error is not None:
        return str(run.error)
    if now is State.UNCLEAR:
        ahead = format_seconds(-(run.silent or 0))
        return (
            f"Its last sign of life is {ahead} in the future, so the clocks differ."
            if run.silent is not None and run.silent < 0
            else "A lease names a run, but not when it gave a sign of life."
        )
    if now is State.STALLED and last is not None:
        if run.since_step is None or not last.trained:
            return f"It has not come to a step in {format_seconds(last.duration)}."
        during = {"checkpoint": " (saving)", "evaluation": " (evaluating)"}.get(last.phase, "")
        return (
            f"It lives, but has made no step for {format_seconds(run.since_step)}{during}: data, "
            "storage or a host hang."
        )
    if now is State.DEAD and last is not None:
        if run.silent is not None and run.holder and lease.lives(run.holder) is False:
            gone = f"Its process {run.holder.pid} on {run.holder.host} is gone"
            return f"{gone}, and left no end: it was killed, or could not write here."
        silence = format_seconds(max(0.0, run.silent or 0.0))
        return (
            f"It has left no end, and no sign of life for {silence} (one comes every 15 s): it was "
            "killed, its host is gone, or cannot write here."
        )
    if now is State.STOPPED:
        return (
            last.reason if last is not None else "It ended before its last step; why is not known."
        )
    return ""


def advice(run: Run) -> str:
    """Returns what to do about the state; "": nothing."""
    now = state(run)
    if now is State.STALLED:
        return (
            "Its log says what it waits for. If it does not go on, end it (SIGTERM; SIGKILL if "
            "that does not help) and run the same command again."
        )
    if now not in (State.STOPPED, State.DEAD):
        return ""
    code = run.last.code if run.last is not None else None
    again = f"The same command {_resumption(run)}"
    if code == ExitCode.USER_ERROR:
        return f"Put right what it names. {again}; unchanged, it would end the same way."
    if code == ExitCode.FAULT:
        return f"This is a fault of the program; its log has the traceback. {again}."
    if code == ExitCode.INTERRUPTED:
        return f"{again}."
    if code is None or code == ExitCode.RESUME or code > 127:
        return f"{again}; a launcher that is still there runs it by itself."
    return f"Its log may say more. {again}."


def _resumption(run: Run) -> str:
    if not run.checkpoints.steps:
        return "begins afresh, since there is no checkpoint"
    step = run.checkpoints.steps[-1]
    lost = (run.step or 0) - step
    return f"resumes at step {step:,}" + (f" and repeats {lost:,} steps" if lost > 0 else "")
