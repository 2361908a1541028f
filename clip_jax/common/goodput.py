"""The goodput of a run: where the time of all its starts went, and how much of it remains.

Loads neither JAX nor NumPy: the command `status` answers at once.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from clip_jax.common.formatting import format_seconds
from clip_jax.common.starts import PHASES, Start

# Kinds of time beside the phases of a start: training that was repeated, time between starts, time
# within a start that its record does not explain, time between starts one of which is missing.
LOST, DOWN, OTHER, UNKNOWN = "lost", "down", "other", "unknown"
KINDS = {
    "train": "training",
    LOST: "training that was lost",
    "data": "waiting for data",
    "checkpoint": "checkpoints",
    "evaluation": "evaluation",
    "compile": "compilation",
    "start": "starting",
    OTHER: "not accounted for",
    DOWN: "down, between starts",
    UNKNOWN: "without a record",
}

_SLACK = 2.0  # seconds by which clocks and sums may differ unnoticed


@dataclasses.dataclass(frozen=True)
class Account:
    """The time of all starts together.

    Attributes:
      seconds: time by kind, as in `KINDS`; the sum is the time from the first beginning to the last
        sign of life.
      lost: number of steps of each start, by its number, that were trained again.
      remarks: a sentence about each thing that makes the figures uncertain.
    """

    seconds: Mapping[str, float]
    lost: Mapping[int, int]
    remarks: Sequence[str]

    @property
    def wall(self) -> float:
        """Seconds of the whole run."""
        return sum(self.seconds.values())

    @property
    def lost_steps(self) -> int:
        """Steps that were trained again."""
        return sum(self.lost.values())

    @property
    def goodput(self) -> float:
        """The fraction of the time in which steps were trained that remain; NaN without time."""
        return self.seconds["train"] / self.wall if self.wall else math.nan


def account(starts: Sequence[Start]) -> Account:
    """Sums up the time of all starts, in order."""
    seconds = dict.fromkeys(KINDS, 0.0)
    remarks: list[str] = []
    lost = {}
    for start, stretches in zip(starts, _stretches(starts)):
        if start.step is not None:
            lost[start.number] = sum(one.reached - one.kept for one in stretches)
        _add(start, stretches, seconds, remarks)
    if starts and starts[0].number > 1:
        remarks.append(
            f"{_missing(1, starts[0].number - 1)} The time before start {starts[0].number} is not "
            "counted."
        )
    for one, other in itertools.pairwise(starts):
        gap = (other.began - max(one.seen, one.began)).total_seconds()
        if gap < -_SLACK:
            remarks.append(
                f"Start {other.number} began {format_seconds(-gap)} before the last sign of life "
                f"of start {one.number}: the clocks differ, or one jumped. No time between them is "
                "counted."
            )
        if other.number > one.number + 1:
            seconds[UNKNOWN] += max(0.0, gap)
            remarks.append(
                f"{_missing(one.number + 1, other.number - 1)} The time between starts "
                f"{one.number} and {other.number} is not explained, and the goodput may be higher."
            )
        else:
            seconds[DOWN] += max(0.0, gap)
    return Account(seconds, lost, remarks)


def _missing(first: int, last: int) -> str:
    if first == last:
        return f"Start {first} has no record that can be read."
    return f"Starts {first} to {last} have no record that can be read."


@dataclasses.dataclass(frozen=True)
class _Stretch:
    """Steps that were trained one after the other.

    Attributes:
      first, last: first and last step, as recorded.
      reached: last step that was trained.
      kept: last step that was not trained again.
    """

    first: int
    last: int
    reached: int
    kept: int


def _stretches(starts: Sequence[Start]) -> list[list[_Stretch]]:
    """Returns the stretches of each start, with what later ones left of them."""
    found: list[list[_Stretch]] = []
    place = {start.number: i for i, start in enumerate(starts)}
    following: Start | None = None  # the start that trained next
    limit = math.inf  # the first step of all later stretches
    for start in reversed(starts):
        found.append([])
        for first, last in reversed(start.stretches):
            reached = last
            # The record of a killed start is some seconds old, and the steps since then may have
            # been saved. Where a start is missing between, it may as well have done them.
            if not found[-1] and following:
                apart = following.number - start.number
                if place[following.number] - place[start.number] == apart:
                    reached = max(reached, following.from_step or 0)
            kept = max(first, int(min(reached, limit)))
            found[-1].insert(0, _Stretch(first, last, reached, kept))
            limit = min(limit, first)
        following = start if start.stretches else following
    return found[::-1]


def _add(
    start: Start, stretches: Sequence[_Stretch], seconds: dict[str, float], remarks: list[str]
) -> None:
    """Adds the time within one start."""
    for name, value in start.seconds.items():
        seconds[name if name in PHASES else OTHER] += value
    if stretches:
        # A step lost beyond the record took no recorded time; one that was not finished was lost.
        steps = sum(one.last - one.first for one in stretches)
        again = sum(max(0, one.last - one.kept) for one in stretches)
        repeated = start.seconds.get("train", 0.0) * (again / steps if steps else 1.0)
        seconds["train"] -= repeated
        seconds[LOST] += repeated
    rest = start.duration - sum(start.seconds.values())
    if start.seen < start.began:
        remarks.append(
            f"Start {start.number} has its last sign of life before its beginning: its clock "
            "jumped, and its duration is taken from its parts."
        )
    elif rest < -max(_SLACK, 0.01 * start.duration):
        remarks.append(
            f"The parts of start {start.number} are {format_seconds(-rest)} longer than the whole: "
            "its clock jumped. The parts are counted."
        )
    seconds[OTHER] += max(0.0, rest)
