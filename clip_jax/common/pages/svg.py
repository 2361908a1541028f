"""Inline SVG that follows the page's light or dark colours: what all plots share.

A plot holds ticks, lines and marks only; its title and legend are HTML, so they reflow and can be
read out. Colours are written as CSS variables: matplotlib draws in placeholder colours that are
replaced in its output.
"""

import io
import re
from typing import Literal

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

LINES = 4  # line styles before they repeat; the page's CSS has as many --line-N colours
DASHES = ("", "6 3", "8 2 2 2", "3 2")  # lines differ by more than their colour
MARKS = ("o", "s", "^", "D")  # and so do marks
INK, RULE = "#000001", "#000002"
_COLOURS = {INK: "var(--ink-soft)", RULE: "var(--rule)"} | {
    f"#00001{i}": f"var(--line-{i})" for i in range(LINES)
}
_RC = {"svg.fonttype": "none", "text.parse_math": False}


def new_axes(width: float = 4.8, height: float = 2.5, *, titled: bool = False) -> Axes:
    """Empty axes; `titled`: with room for titles of both, in inches."""
    figure = Figure(figsize=(width, height))
    FigureCanvasSVG(figure)
    left, bottom = (0.75, 0.62) if titled else (0.62, 0.32)
    return figure.add_axes(
        (left / width, bottom / height, 1 - (left + 0.1) / width, 1 - (bottom + 0.12) / height)
    )


def colour(index: int) -> str:
    """Of the line at this position."""
    return f"#00001{index % LINES}"


def dash(index: int):
    """matplotlib's style of the line at this position."""
    lengths = [float(length) for length in DASHES[index % LINES].split()]
    return (0, lengths) if lengths else "-"


def style(axes: Axes, grid: Literal["both", "y"] = "y") -> None:
    """Quiet rules behind the data, no frame."""
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=RULE, linewidth=0.8)
    axes.tick_params(length=0, labelcolor=INK, labelsize=10, pad=5)
    axes.minorticks_off()
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(RULE)


def number_ticks(axis, *, share: bool = False, integer: bool = False) -> None:
    """At most six ticks; `share`: fractions, shown in per cent."""
    axis.set_major_locator(MaxNLocator(5, integer=integer))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value, share)))


def tick(value: float, share: bool) -> str:
    """The text of a tick."""
    return f"{100 * value:.4g} %" if share else short(value)


def render(axes: Axes, label: str, salt: str) -> Markup:
    """The <svg> element.

    Args:
      axes: drawn on.
      label: the accessible name, plain text.
      salt: keeps the ids of one page's plots apart, and each the same from run to run.
    """
    buffer = io.StringIO()
    with mpl.rc_context(_RC | {"svg.hashsalt": salt}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inline(buffer.getvalue(), label)


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
