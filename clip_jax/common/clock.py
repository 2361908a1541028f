"""Converts durations such as "32 epochs" to steps, and schedules periodic work."""

import math
from collections.abc import Collection

from clip_jax.errors import UserError

UNITS = ("steps", "examples", "epochs", "percent")
_SECONDS = {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0}


def to_steps(
    duration: str,
    *,
    batch_size: int,
    examples_per_epoch: int,
    total_steps: int | None = None,
) -> int:
    """Converts a duration to steps, rounded to the nearest and at least 1 (0 stays 0).

    Args:
      duration: "N steps", "N examples", "N epochs" or "N percent"; N may be written 12.8e9.
      batch_size: examples per step, over all devices.
      examples_per_epoch: size of the training set.
      total_steps: length of the run; None where percent has no meaning.

    Raises:
      UserError: not a number and a unit, negative, or percent without `total_steps`.
    """
    steps = exact_steps(
        duration,
        batch_size=batch_size,
        examples_per_epoch=examples_per_epoch,
        total_steps=total_steps,
    )
    return max(1, round(steps)) if steps else 0


def exact_steps(
    duration: str, *, batch_size: int, examples_per_epoch: int, total_steps: int | None = None
) -> float:
    """Converts a duration to steps, not rounded; arguments and errors as for `to_steps`."""
    number, unit = _parse(duration, UNITS)
    if unit == "percent" and total_steps is None:
        raise UserError(f"{duration!r}: the length of the run cannot be a percentage of itself.")
    return {
        "steps": number,
        "examples": number / batch_size,
        "epochs": number * examples_per_epoch / batch_size,
        "percent": number / 100 * (total_steps or 0),
    }[unit]


def to_seconds(interval: str) -> float | None:
    """Returns the seconds of an interval such as "10 minutes"; None: it is a duration in steps.

    Raises:
      UserError: it is neither.
    """
    number, unit = _parse(interval, (*_SECONDS, *UNITS))
    return number * _SECONDS[unit] if unit in _SECONDS else None


def _parse(duration: str, units: Collection[str]) -> tuple[float, str]:
    try:
        text, unit = duration.split()
        number = float(text.replace("_", "").replace(",", ""))
    except ValueError:
        number, unit = -1.0, ""
    unit = unit if unit.endswith("s") or unit == "percent" else unit + "s"
    if not math.isfinite(number) or number < 0 or unit not in units:
        examples = '"500 steps" or "10 minutes"' if "minutes" in units else '"500 steps"'
        raise UserError(
            f"{duration!r} is not a duration: write a number and one of {', '.join(units)}, "
            f"such as {examples}."
        )
    return number, unit


def fault(duration: str, *, may_be_time: bool = False) -> str:
    """Returns the error that a duration would give, whatever the run; "": none."""
    try:
        _parse(duration, (*_SECONDS, *UNITS) if may_be_time else UNITS)
    except UserError as error:
        return str(error)
    return ""


def is_due(step: int, every: int, last: int) -> bool:
    """Tells whether work done every `every` steps, and after the last, is due after `step`."""
    return step == last or (every > 0 and step % every == 0)
