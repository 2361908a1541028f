"""Curves in a terminal, drawn with braille dots or, for several without colour, with letters."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int

from clip_jax.common.formatting import short
from clip_jax.status.look import Look

Series = Mapping[int, float]  # values by step

_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])  # of a braille cell
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def draw(
    series: Sequence[Series], look: Look, height: int = 8, show: Callable[[float], str] = short
) -> list[str]:
    """Draws series over one pair of axes.

    Args:
      series: at least one, with a finite value somewhere.
      look: width, colours and characters of the terminal.
      height: lines of the plot, without the axis below.
      show: formats a value.

    Returns:
      Lines of text.
    """
    steps = [step for one in series for step in one]
    values = [value for one in series for value in one.values() if math.isfinite(value)]
    low, high, first, last = min(values), max(values), min(steps), max(steps)
    ticks = {height - 1: show(low)}
    if high > low:
        middle = (height - 1) // 2
        ticks |= {0: show(high), middle: show(high - (high - low) * (middle + 0.5) / height)}
    margin = max(len(text) for text in ticks.values())
    width = look.width - margin - 3
    dots = [_dots(one, (first, last), (low, high), (4 * height, 2 * width)) for one in series]
    up, tick, corner, line = "│┤└─" if look.unicode else "||+-"
    rows = [
        f"{ticks.get(y, ''):>{margin}} {tick if y in ticks else up}{text}".rstrip()
        for y, text in enumerate(_cells(dots, look))
    ]
    begin, end = f"{first:,}", f"step {last:,}"
    below = f"{begin}{end:>{width - len(begin)}}"
    return [*rows, f"{'':{margin}} {corner}{line * width}", f"{'':{margin + 2}}{below}"]


def _dots(
    series: Series, steps: tuple[int, int], values: tuple[float, float], shape: tuple[int, int]
) -> Bool[np.ndarray, "height width"]:
    """Draws a line of dots: the mean value in each column, joined where columns are empty."""
    (first, last), (low, high), (height, width) = steps, values, shape
    points = sorted((step, value) for step, value in series.items() if math.isfinite(value))
    x = np.array([(step - first) * (width - 1) // max(1, last - first) for step, _ in points])
    dots = np.zeros(shape, bool)
    if not len(x):
        return dots
    columns, group = np.unique(x, return_inverse=True)
    mean = np.bincount(group, [value for _, value in points]) / np.bincount(group)
    span = np.arange(columns[0], columns[-1] + 1)
    level = (np.interp(span, columns, mean) - low) / ((high - low) or 1.0)
    y = np.clip(np.rint((height - 1) * (1 - level)), 0, height - 1).astype(np.int64)
    before = np.concatenate([y[:1], y[:-1]])
    for column, start, end in zip(span, np.minimum(before, y), np.maximum(before, y)):
        dots[start : end + 1, column] = True
    return dots


def _cells(dots: Sequence[Bool[np.ndarray, "height width"]], look: Look) -> list[str]:
    """Returns the lines of a plot; of several series in one cell the first is seen."""
    height, width = dots[0].shape[0] // 4, dots[0].shape[1] // 2
    cells = [one.reshape(height, 4, width, 2).swapaxes(1, 2) for one in dots]
    owner: Int[np.ndarray, "height width"] = np.full((height, width), -1)
    for i in reversed(range(len(cells))):
        owner[cells[i].any(axis=(2, 3))] = i
    merged = np.any(cells, axis=0)
    codes = (merged * _DOTS).sum(axis=(2, 3))
    lines = []
    for y in range(height):
        line = [(int(owner[y, x]), int(codes[y, x])) for x in range(width)]
        text = ""
        for mine, some in itertools.groupby(line, key=lambda cell: cell[0]):
            drawn = "".join(_character(code, mine, len(dots), look) for _, code in some)
            text += drawn if mine < 0 else look.paint(drawn, mine)
        lines.append(text)
    return lines


def _character(code: int, owner: int, count: int, look: Look) -> str:
    if owner < 0:
        return " "
    if look.unicode and (count == 1 or look.colour):
        return chr(0x2800 + int(code))
    return "*" if count == 1 else mark(owner)


def mark(index: int) -> str:
    """Returns the letter of a series among several."""
    return _LETTERS[index % len(_LETTERS)]


def level(value: float, width: int, look: Look) -> str:
    """Returns a bar that fills a fraction of the width."""
    eighths = round(8 * width * min(1.0, max(0.0, value)))
    if not look.unicode:
        return "#" * round(eighths / 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")
