"""Learning curves as small inline SVG that follows the page's light or dark colours.

A plot holds ticks and lines only; its title and legend are HTML, so they reflow and can be read
out. Colours are written as CSS variables: matplotlib draws in placeholder colours that are
replaced in its output.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

LINES = 4  # line styles before they repeat; the page's CSS has as many --line-N colours
DASHES = ("", "6 3", "8 2 2 2", "3 2")  # lines differ by more than their colour
_POINTS = 300  # drawn of a series at most: longer ones are averaged, for the size of the file
_MARKED = 25  # a series this short gets a mark at every point
_COLOURS = {
    "#000001": "var(--ink-soft)",
    "#000002": "var(--rule)",
} | {f"#00001{i}": f"var(--line-{i})" for i in range(LINES)}
_INK, _RULE = "#000001", "#000002"
_RC = {"svg.fonttype": "none", "text.parse_math": False}


@dataclass(frozen=True)
class Series:
    """One metric over the run: steps int [n], ascending; values float [n], NaN where not finite."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    chance: float | None = None  # level that guessing reaches

    @property
    def first(self) -> float:
        return float(self.values[0])

    @property
    def last(self) -> float:
        return float(self.values[-1])


def collect(
    history: Iterable[Mapping[str, float]], chance: Mapping[str, float]
) -> dict[str, Series]:
    """Turns rows of metrics into one series per metric, in order of first appearance.

    Only names with a group ("train/loss") are metrics; a bare name ("step", "epoch") is a
    coordinate. Where a resumed run logged a step again, the later row counts.
    """
    points: dict[str, dict[int, float]] = {}
    for row in history:
        for name in row:
            if "/" in name:
                points.setdefault(name, {})[int(row["step"])] = float(row[name])
    return {name: _series(name, values, chance.get(name)) for name, values in points.items()}


def _series(name: str, values: Mapping[int, float], chance: float | None) -> Series:
    steps = np.array(sorted(values), np.int64)
    numbers = np.array([values[step] for step in steps.tolist()], np.float64)
    return Series(name, steps, np.where(np.isfinite(numbers), numbers, np.nan), chance)


def draw(series: Sequence[Series], label: str, *, share: bool = False) -> Markup:
    """Returns the <svg> element that shows all series in one pair of axes.

    Args:
      series: at least one; each gets the dash and colour of its position.
      label: the accessible name, plain text.
      share: the values are fractions, shown as percentages from zero.
    """
    figure = Figure(figsize=(4.8, 2.5))
    FigureCanvasSVG(figure)
    axes = figure.add_axes((0.13, 0.13, 0.85, 0.82))
    for index, one in enumerate(series):
        _draw_series(axes, one, index)
    _style(axes, share)
    buffer = io.StringIO()
    # The salt keeps the ids of one page's plots apart, and each the same from run to run.
    with mpl.rc_context(_RC | {"svg.hashsalt": " ".join(one.label for one in series)}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inline(buffer.getvalue(), label)


def _draw_series(axes, series: Series, index: int) -> None:
    colour = f"#00001{index % LINES}"
    dash = [float(length) for length in DASHES[index % LINES].split()]
    steps, mean, low, high = thin(series.steps, series.values)
    if len(steps) < len(series.steps):
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(
        steps,
        mean,
        color=colour,
        linewidth=1.6,
        linestyle=(0, dash) if dash else "-",
        marker="o" if len(steps) <= _MARKED else None,
        markersize=3.5,
    )
    if series.chance is not None:
        axes.axhline(series.chance, color=colour, linewidth=1, linestyle=(0, (1, 3)))


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, ...]:
    """Averages a long series in neighbouring groups; returns steps, mean, lowest and highest."""
    if len(steps) <= _POINTS:
        return steps, values, values, values
    starts = np.linspace(0, len(steps), _POINTS, endpoint=False).astype(np.int64)
    there = np.isfinite(values)
    # A group without any finite value divides 0 by 0: the NaN is the gap wanted in the line.
    with np.errstate(invalid="ignore"):
        mean = np.add.reduceat(np.where(there, values, 0), starts) / np.add.reduceat(
            there, starts, dtype=np.int64
        )
    # The last step of each group, so that the curve ends where the run did.
    ends = np.append(starts[1:], len(steps)) - 1
    low, high = np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)
    return steps[ends], mean, low, high


def short(value: float) -> str:
    """A number in about five characters: 2.5e-4, 0.05, 12.5, 1191, 12k, 3M."""
    if not np.isfinite(value):
        return "not finite"
    if 0 < abs(value) < 1e-3:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= max(factor, 9999.5):
            return f"{value / factor:.4g}{unit}"
    return f"{value:.4g}"


def _style(axes, share: bool) -> None:
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.tick_params(length=0, labelcolor=_INK, labelsize=10, pad=5)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_RULE)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{100 * value:.4g} %" if share else short(value))
    )
    if share:
        axes.set_ylim(0, max(0.01, min(1.02, 1.05 * axes.get_ylim()[1])))


def _inline(document: str, label: str) -> Markup:
    """Makes a fragment of matplotlib's SVG document: no prologue, fonts, global style, spare id."""
    document = document[document.index("<svg") :]
    view = document[document.index("viewBox=") :].split('"')[1]
    body = document[document.index(">") + 1 : document.rindex("</svg>")]
    body = re.sub(r"<!--.*?-->|<style.*?</style>|<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r"font-family: [^;]*; ", "", body)
    # Names such as "axes_1" repeat from plot to plot, which ids of one page must not.
    body = re.sub(r' id="[\w.]+_\d+"', "", body)
    for placeholder, variable in _COLOURS.items():
        body = body.replace(placeholder, variable)
    body = re.sub(r">\s+<", "><", body).strip()
    head = f'<svg class="plot" role="img" aria-label="{escape(label)}" viewBox="{view}">'
    return Markup(f"{head}{body}</svg>")
