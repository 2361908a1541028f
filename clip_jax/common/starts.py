"""The starts of a run, read back: how each went and how it ended.

`clip_jax.training.record` writes one file for each start. A start that was killed has no end, but a
last sign of life. Loads neither JAX nor NumPy: the command `status` answers at once.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from concurrent import futures
from datetime import datetime
from typing import Any, NoReturn

from etils import epath

from clip_jax.errors import ExitCode
from clip_jax.storage import locations, ranges

DIRECTORY = "starts"  # inside the workdir
# Kinds of time in a record. "data", waiting for batches, is not part of "train".
PHASES = ("start", "compile", "train", "data", "checkpoint", "evaluation")

_OUTCOMES: dict[int, str] = {
    ExitCode.DONE: "finished",
    ExitCode.FAULT: "fault",
    ExitCode.USER_ERROR: "user error",
    ExitCode.RESUME: "stopped",
    ExitCode.INTERRUPTED: "Ctrl-C",
}
_READERS = 16  # files of a bucket that are read at a time
_NAME = re.compile(r"(\d{4,})\.json")
_LONGEST = 1e10  # seconds that a start can have taken


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that went wrong, or was mended.

    Attributes:
      time: time at which it was noticed.
      step: step of the run.
      text: one sentence or more.
    """

    time: datetime
    step: int
    text: str


@dataclasses.dataclass(frozen=True)
class Start:
    """One start of a run.

    Attributes:
      number: number of the start, from 1.
      began, seen: its beginning and its last sign of life.
      code: exit code; None: no end is recorded.
      reason: sentence on the end, "" without one.
      from_step, step: first and last step; None: it did not come to training.
      rollbacks: steps from and to which it went back, to train them again past bad batches.
      total_steps: length of the run; None: not known.
      batch_size: examples per step; None: not known.
      seconds: time by phase.
      events: what went wrong, oldest first.
      phase: the phase at `seen`; "": not known.
      stepped: time of the last step; None: not known.
      facts: further fields, such as "command" and "hardware".
    """

    number: int
    began: datetime
    seen: datetime
    code: int | None
    reason: str
    from_step: int | None
    step: int | None
    rollbacks: Sequence[tuple[int, int]]
    total_steps: int | None
    batch_size: int | None
    seconds: Mapping[str, float]
    events: Sequence[Event]
    phase: str
    stepped: datetime | None
    facts: Mapping[str, Any]

    @property
    def duration(self) -> float:
        """Seconds from its beginning to the last sign of life."""
        return max(0.0, (self.seen - self.began).total_seconds())

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """First and last step of each stretch between roll-backs, in order."""
        if self.from_step is None or self.step is None:
            return []
        firsts = [self.from_step, *(to for _, to in self.rollbacks)]
        return list(zip(firsts, [*(last for last, _ in self.rollbacks), self.step]))

    @property
    def trained(self) -> int:
        """The number of steps that it took, repeated ones counted again."""
        return sum(last - first for first, last in self.stretches)

    def outcome(self, live: bool = False) -> str:
        """Returns how it ended, in a word or two; `live`: it may still run."""
        if self.code is None:
            return "running" if live else "killed"
        return _OUTCOMES.get(self.code, f"exit code {self.code}")

    def ending(self, live: bool = False) -> str:
        """Returns how it ended, with the reason; arguments as `outcome`."""
        word = self.outcome(live)
        if word == "killed":
            return "killed, or its host is gone"
        # The reason of a run that finished says that it did.
        return f"{word}: {self.reason}" if self.reason and self.code != ExitCode.DONE else word


def read(workdir: epath.PathLike) -> tuple[list[Start], list[str]]:
    """Reads the starts of a run.

    Args:
      workdir: local, gs:// or s3://.

    Returns:
      The starts in order, and a sentence about each file that cannot be used.
    """
    folder = locations.parse(workdir) / DIRECTORY
    paths = {number: path(folder, number) for number in numbers(folder)}
    found, damaged = [], []
    with futures.ThreadPoolExecutor(_READERS) as pool:
        for number, text in zip(paths, pool.map(_read, paths.values())):
            try:
                found.append(parse(text, number))
            except (ValueError, RecursionError) as error:
                name = f"{DIRECTORY}/{paths[number].name}"
                damaged.append(f"{name} is left out, since it is damaged: {error}.")
    return found, damaged


def numbers(folder: epath.Path) -> list[int]:
    """Returns the numbers of the starts that have a record in a folder, ascending."""
    try:
        names = locations.listing(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def path(folder: epath.Path, number: int) -> epath.Path:
    """Returns the file of a start."""
    return folder / f"{number:04}.json"


def _read(path: epath.Path) -> bytes:
    try:
        return ranges.read(path)
    except FileNotFoundError:  # removed meanwhile
        return b""


def parse(text: bytes | str, number: int) -> Start:
    """Returns the start that a file describes.

    Args:
      text: contents of the file.
      number: number of the start.

    Raises:
      ValueError: a part is missing or impossible; the message names it.
    """
    try:
        fields = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except ValueError:
        raise ValueError("it is cut short, or not JSON") from None
    if not isinstance(fields, dict):
        raise ValueError("it is not an object")
    known = {field.name for field in dataclasses.fields(Start)} | {"start", "end", "ended"}
    end = fields.get("end")
    if end is not None and not (isinstance(end, dict) and type(end.get("code")) is int):
        raise ValueError(f'"end" is {end!r:.60}')
    from_step, step = _count(fields, "from_step"), _count(fields, "step")
    if from_step is None or step is None:
        from_step = step = None
    start = Start(
        number=number,
        began=_time(fields, "began"),
        seen=_time(fields, "seen"),
        code=end["code"] if end else None,
        reason=str(end.get("reason", "")) if end else "",
        from_step=from_step,
        step=step,
        total_steps=_count(fields, "total_steps"),
        batch_size=_count(fields, "batch_size"),
        rollbacks=_rollbacks(fields.get("rollbacks") or []),
        seconds=_seconds(fields),
        events=_events(fields.get("events") or []),
        phase=str(fields.get("phase") or ""),
        stepped=_time(fields, "stepped") if fields.get("stepped") else None,
        facts={name: value for name, value in fields.items() if name not in known},
    )
    for first, last in start.stretches:
        if last < first:
            raise ValueError(f"it goes from step {first} to step {last}")
    return start


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _refuse(text)


def _count(fields: Mapping[str, Any], name: str) -> int | None:
    value = fields.get(name)
    if value is not None and (type(value) is not int or not 0 <= value < 2**63):
        raise ValueError(f'"{name}" is {value!r:.60}')
    return value


def _time(fields: Mapping[str, Any], name: str) -> datetime:
    try:
        found = datetime.fromisoformat(fields[name])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f'"{name}" is {fields.get(name)!r:.60}') from None
    if found.tzinfo is None:
        raise ValueError(f'"{name}" has no time zone')
    if not 1970 <= found.year < 9000:  # near the ends of the calendar there is no local time
        raise ValueError(f'"{name}" is in the year {found.year}')
    return found


def _seconds(fields: Mapping[str, Any]) -> dict[str, float]:
    found = fields.get("seconds") or {}
    if not isinstance(found, dict):
        raise ValueError(f'"seconds" is {found!r:.60}')
    for name, value in found.items():
        if type(value) not in (int, float) or not 0 <= value < _LONGEST:
            raise ValueError(f'"seconds" of {name!r:.60} is {value!r:.60}')
    return found


def _rollbacks(found: Any) -> list[tuple[int, int]]:
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ValueError('"rollbacks" is no list of objects')
    return [(_count(one, "from_step") or 0, _count(one, "to_step") or 0) for one in found]


def _events(found: Any) -> list[Event]:
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ValueError('"events" is no list of objects')
    return [
        Event(_time(one, "time"), _count(one, "step") or 0, str(one.get("text", "")))
        for one in found
    ]
