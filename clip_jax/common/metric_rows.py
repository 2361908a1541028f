"""Rows of metrics.jsonl, read back; loads no JAX."""

import json
import logging
import re

from etils import epath

from clip_jax.storage import locations, ranges

FILE = "metrics.jsonl"  # inside the workdir
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # and lone surrogates


def read_history(workdir: epath.PathLike) -> list[dict[str, float]]:
    """Reads the rows of metrics.jsonl, oldest first; drops and counts lines that are no rows."""
    rows, dropped = read(workdir)
    if dropped:
        logging.warning(
            "Dropped %d of %d lines of %s, which are cut short, not UTF-8, or not a row of numbers "
            "with a step. A process that is killed can leave one such line.",
            dropped,
            len(rows) + dropped,
            locations.parse(workdir) / FILE,
        )
    return rows


def read(workdir: epath.PathLike) -> tuple[list[dict[str, float]], int]:
    """Reads the rows of metrics.jsonl, oldest first, and the number of lines that are no rows."""
    try:
        data = ranges.read(locations.parse(workdir) / FILE)
    except FileNotFoundError:
        return [], 0
    lines = [line for line in data.split(b"\n") if line.strip()]
    rows = [row for line in lines if (row := _parse_row(line)) is not None]
    # Neither a terminal nor a page is to obey a name, or to fail at one.
    evil = set(filter(_CONTROL.search, set[str]().union(*rows)))
    rows = [row for row in rows if evil.isdisjoint(row)] if evil else rows
    return rows, len(lines) - len(rows)


def _parse_row(line: bytes) -> dict[str, float] | None:
    """Returns a row of metrics.jsonl; None where the line is not one."""
    try:
        row = _decoder.decode(line.decode())
    except (ValueError, RecursionError):  # cut short, not UTF-8, or nested too deep
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 0:
        return None
    return row if _NUMBERS.issuperset(map(type, row.values())) else None


def _integer(text: str) -> int:
    # JSON has integers of any length; one that is no float would be an error wherever it is used.
    value = int(text)
    if abs(value) >= 2**63:
        raise ValueError(f"{text} is too large")
    return value


_NUMBERS = {int, float}  # and not bool
_decoder = json.JSONDecoder(parse_int=_integer)
