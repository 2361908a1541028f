"""Reads what a budget, a price and a number of pairs say: 256 v5e-days, 1.20 dollars/chip-hour."""

import dataclasses
import math
import re

from clip_jax.errors import UserError
from clip_jax.plan.chips import CHIPS, Chip

_NUMBER = r"([\d_,]*\.?\d+(?:[eE][+-]?\d+)?)"
_FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_FACTORS |= {"thousand": 1e3, "million": 1e6, "billion": 1e9}
_DAYS = {"hour": 1 / 24, "day": 1.0, "week": 7.0}


@dataclasses.dataclass(frozen=True)
class Budget:
    """Days of one chip that may be spent."""

    chip: Chip
    days: float


@dataclasses.dataclass(frozen=True)
class Price:
    """The price of a chip for a day, in some currency."""

    currency: str
    per_day: float


def parse_budget(text: str) -> Budget:
    """Reads "256 v5e-days", "6144 v5e-hours" or "40 v5e-weeks".

    Raises:
      UserError: no number, no unit, an unknown chip, nothing to spend.
    """
    example = 'a number, a chip and a time, as in --budget="256 v5e-days"'
    found = re.fullmatch(rf"\s*{_NUMBER}\s*([a-z]\w*)-(hour|day|week)s?\s*", text, re.IGNORECASE)
    if re.fullmatch(rf"\s*{_NUMBER}\s*", text):
        raise UserError(
            f"--budget={text.strip()} has no unit: it is {example}. The minutes that a --search "
            f"may take are --search_minutes={text.strip()} now."
        )
    if not found:
        raise UserError(f"--budget={text!r} cannot be read: it is {example}.")
    name = found[2].lower()
    if name not in CHIPS:
        raise UserError(
            f"--budget={text!r}: there is no chip {found[2]} in the table; there are "
            f"{', '.join(CHIPS)}."
        )
    days = _number(found[1], "--budget") * _DAYS[found[3].lower()]
    if days <= 0:
        raise UserError(f"--budget={text!r} leaves nothing to spend: it is {example}.")
    return Budget(CHIPS[name], days)


def parse_price(text: str, chip: Chip) -> Price:
    """Reads "1.20 dollars/chip-hour", also with the chip's name or a day.

    Raises:
      UserError: no number, no currency or no unit of time; the price of another chip.
    """
    found = re.fullmatch(
        rf"\s*{_NUMBER}\s*([^\W\d_]+)\s*(?:/|per)\s*(\w+)-(hour|day)\s*", text, re.IGNORECASE
    )
    if not found:
        raise UserError(
            f"--price={text!r} needs a number, a currency and a unit: "
            '--price="1.20 dollars/chip-hour".'
        )
    if found[3].lower() not in ("chip", chip.name):
        raise UserError(f"--price={text!r} is not one of a {chip.name}, of which the budget is.")
    return Price(found[2], _number(found[1], "--price") / _DAYS[found[4].lower()])


def parse_pairs(text: str) -> float:
    """Reads "400M", "1.4B", "400 million" or "4e8".

    Raises:
      UserError: not a number of at least one pair.
    """
    found = re.fullmatch(rf"\s*{_NUMBER}\s*([a-z]*?)(?:\s+pairs)?\s*", text, re.IGNORECASE)
    if not found or found[2].lower() not in _FACTORS:
        raise UserError(
            f"--pairs={text!r} is no number of image-text pairs, as in --pairs=400M or 1.4B."
        )
    pairs = _number(found[1], "--pairs") * _FACTORS[found[2].lower()]
    if pairs < 1:
        raise UserError(f"--pairs={text!r} is less than one pair.")
    return pairs


def count(number: float) -> str:
    """Formats a number of pairs: 12.8M, 3.2B."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:.3g}"


def _number(text: str, flag: str) -> float:
    number = float(text.replace(",", "").replace("_", ""))
    if not math.isfinite(number):
        raise UserError(f"{flag}: {text} is not finite.")
    return number
