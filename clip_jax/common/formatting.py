"""Numbers, durations and tables as text for people."""

import math
from collections.abc import Sequence


def percent(fraction: float) -> str:
    """Formats a fraction as "95.8 %"; more digits where it is tiny, a dash for NaN."""
    if math.isnan(fraction):
        return "–"
    points = 100 * fraction
    text = f"{points:.1f}" if points == 0 or abs(points) >= 1 else f"{points:.2g}"
    return f"{text}\N{NO-BREAK SPACE}%"


def format_seconds(seconds: float) -> str:
    """Formats a duration as "42s", "3m 07s", "2h 05m" or "4d 03h"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02}h"
    if hours:
        return f"{h}h {m:02}m"
    return f"{m}m {s:02}s" if minutes else f"{s}s"


def short(value: float) -> str:
    """Formats a number in about five characters: 2.5e-4, 0.05, 12.5, 1191, 12k, 3M, 2e20."""
    if not math.isfinite(value):
        return "not finite"
    if 0 < abs(value) < 1e-3 or abs(value) >= 9.995e15:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= max(factor, 9999.5):
            return f"{value / factor:.4g}{unit}"
    return f"{value:.4g}"


def aligned(rows: Sequence[Sequence[str]], sides: str) -> str:
    """Aligns rows of cells in columns, one line per row.

    Args:
      rows: cells as text, the header first.
      sides: "<" or ">" for each column.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(sides))]
    lines = []
    for row in rows:
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
