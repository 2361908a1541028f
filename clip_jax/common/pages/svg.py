"""Inline SVG that follows the page's light or dark colours: the common part of all plots.

A plot holds ticks, lines and marks only; its title and legend are HTML, so they reflow and can be
read out. Colours are written as CSS variables: matplotlib draws in placeholder colours that are
replaced in its output.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from clip_jax.common.formatting import short

LINES = 4  # colours before they repeat, then with other dashes; the page's CSS has as many --line-N
# Lines and marks differ by more than their colour, for readers who cannot tell colours apart.
DASHES = ("", "6 3", "8 2 2 2", "3 2")
MARKS = ("o", "s", "^", "D")
INK, RULE = "#000001", "#000002"
_COLOURS = {INK: "var(--ink-soft)", RULE: "var(--rule)"} | {
    f"#00001{i}": f"var(--line-{i})" for i in range(LINES)
}
_RC = {"svg.fonttype": "none", "text.parse_math": False}


@dataclass(frozen=True)
class Line:
    """A series in the legend of a plot; its position gives it colour and dash.

    Attributes:
      name: label of the series.
      last: its last value; "": not shown.
      chance: the level of guessing; "": not shown.
      joined: whether it is drawn as a line, not as points.
      quiet: whether it is drawn in the colour of rules.
    """

    name: str
    last: str = ""
    chance: str = ""
    joined: bool = True
    quiet: bool = False


@dataclass(frozen=True)
class Panel:
    """A plot with its title and legend, as the macro `figure` of figures.html.jinja shows it.

    Attributes:
      title: heading above the plot.
      svg: the plot.
      legend: one line per series; swatches are shown where there are several.
      note: text below the plot; "": none.
    """

    title: str
    svg: Markup
    legend: Sequence[Line]
    note: str = ""


def new_axes(width: float = 4.8, height: float = 2.5, *, titled: bool = False) -> Axes:
    """Creates empty axes.

    Args:
      width, height: size of the plot in inches.
      titled: whether to leave room for titles of both axes.
    """
    figure = Figure(figsize=(width, height))
    FigureCanvasSVG(figure)
    left, bottom = (0.75, 0.62) if titled else (0.62, 0.32)
    return figure.add_axes(
        (left / width, bottom / height, 1 - (left + 0.1) / width, 1 - (bottom + 0.12) / height)
    )


def colour(index: int) -> str:
    """Returns the colour of the line at a position."""
    return f"#00001{index % LINES}"


def dash(index: int) -> Any:
    """Returns matplotlib's dash style of the line at a position."""
    lengths = [float(length) for length in DASHES[(index + index // LINES) % LINES].split()]
    return (0, lengths) if lengths else "-"


def style(axes: Axes, grid: Literal["both", "y"] = "y") -> None:
    """Draws quiet rules behind the data, and no frame."""
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=RULE, linewidth=0.8)
    axes.tick_params(length=0, labelcolor=INK, labelsize=10, pad=5)
    axes.minorticks_off()
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(RULE)


def number_ticks(axis: Any, *, percent: bool = False, integer: bool = False) -> None:
    """Sets at most six ticks.

    Args:
      axis: axis of matplotlib.
      percent: whether values are fractions, shown as percentages.
      integer: whether ticks are whole numbers.
    """
    axis.set_major_locator(MaxNLocator(5, integer=integer))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value, percent)))


def tick(value: float, percent: bool) -> str:
    """Formats a tick; `percent`: the value is a fraction, shown as a percentage."""
    return f"{100 * value:.4g} %" if percent else short(value)


def render(axes: Axes, label: str, salt: str) -> Markup:
    """Renders axes as an <svg> element.

    Args:
      axes: finished plot.
      label: accessible name, plain text.
      salt: seed of the element ids, distinct within a page and the same from run to run.
    """
    buffer = io.StringIO()
    with mpl.rc_context(_RC | {"svg.hashsalt": salt}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inline(buffer.getvalue(), label)


def _inline(document: str, label: str) -> Markup:
    """Cuts matplotlib's SVG document to a fragment without prologue, fonts and global style."""
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
