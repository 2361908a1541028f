"""Scatter plots and fitted lines: scores by shots or compute, one score against another."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Real
from markupsafe import Markup
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from clip_jax.common.pages import svg

_LOGIT_TICKS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
_MOST_TICKS = 7
_NAMED = 30  # charts of more points get no names beside them


Values = Sequence[float] | Real[np.ndarray, " n"]


@dataclass(frozen=True)
class Axis:
    """One axis of a plot.

    Attributes:
      title: quantity and unit.
      scale: "linear", "log" or "logit" (of fractions).
      percent: whether values are fractions, shown as percentages.
      ticks: positions; (): as the scale suggests.
    """

    title: str
    scale: str = "linear"
    percent: bool = False
    ticks: tuple[float, ...] = ()


@dataclass(frozen=True)
class Points:
    """One series; its position gives it colour, dash and mark.

    Attributes:
      label: text in the legend; "": not listed.
      x, y: coordinates [n]; points that are not finite, or off the scale, are not drawn.
      low, high: bounds of y, [n]; (): no error bars.
      names: labels beside the points; (): none.
      joined: whether a line joins the points.
      marked: whether the points themselves are drawn.
      quiet: whether it is background, drawn in the colour of rules.
    """

    label: str
    x: Values
    y: Values
    low: Values = ()
    high: Values = ()
    names: Sequence[str] = ()
    joined: bool = False
    marked: bool = True
    quiet: bool = False


def draw(
    series: Sequence[Points], x: Axis, y: Axis, label: str, *, diagonal: bool = False
) -> Markup:
    """Draws all series in one pair of axes, as an <svg> element.

    Args:
      series: at least one.
      x, y: the axes.
      label: accessible name, plain text.
      diagonal: whether to draw the line y = x.
    """
    axes = svg.new_axes(4.8, 3.4, titled=True)
    for axis, about in ((axes.set_xscale, x), (axes.set_yscale, y)):
        axis(about.scale)
    scales = x.scale, y.scale
    for index, one in enumerate(series):
        _draw_points(axes, one, index, scales)
    axes.get_xlim(), axes.get_ylim()  # fixes the limits, on which positions of names depend
    if sum(len(one.names) for one in series) <= _NAMED:
        for one in series:
            if one.names:
                _write_names(axes, one, scales)
    if diagonal:
        low = max(axes.get_xlim()[0], axes.get_ylim()[0])
        high = min(axes.get_xlim()[1], axes.get_ylim()[1])
        ends = np.linspace(low, high, 50)
        axes.plot(ends, ends, color=svg.INK, linewidth=0.8, linestyle=(0, (1, 3)))
    svg.style(axes, grid="both")
    for axis, about, limits in (
        (axes.xaxis, x, axes.get_xlim()),
        (axes.yaxis, y, axes.get_ylim()),
    ):
        _set_ticks(axis, about, limits)
    axes.set_xlabel(x.title, color=svg.INK, fontsize=10)
    axes.set_ylabel(y.title, color=svg.INK, fontsize=10)
    return svg.render(axes, label, label)


def _draw_points(axes, one: Points, index: int, scales: tuple[str, str]) -> None:
    x, y = np.asarray(one.x, np.float64), np.asarray(one.y, np.float64)
    shown = _showable(x, scales[0]) & _showable(y, scales[1])
    colour = svg.INK if one.quiet else svg.colour(index)
    if len(one.low):
        low, high = (np.asarray(part, np.float64)[shown] for part in (one.low, one.high))
        reach = np.nan_to_num(np.stack([y[shown] - low, high - y[shown]])).clip(0)
        axes.errorbar(x[shown], y[shown], reach, fmt="none", ecolor=colour, elinewidth=1)
    axes.plot(
        x[shown],
        y[shown],
        color=colour,
        linewidth=1.2 if one.quiet else 1.6,
        linestyle=(svg.dash(index) if not one.quiet else (0, (4, 3))) if one.joined else "none",
        marker=svg.MARKS[index % svg.LINES] if one.marked else None,
        markersize=3 if one.quiet else 4.5,
        alpha=0.6 if one.quiet else 1.0,
    )


def _write_names(axes, one: Points, scales: tuple[str, str]) -> None:
    """Writes names beside the points, where there is room; call it once all are drawn."""
    x, y = np.asarray(one.x, np.float64), np.asarray(one.y, np.float64)
    for at in np.flatnonzero(_showable(x, scales[0]) & _showable(y, scales[1])):
        position = axes.transAxes.inverted().transform(axes.transData.transform((x[at], y[at])))
        left = position[0] > 0.7
        axes.annotate(
            one.names[int(at)],
            (x[at], y[at]),
            xytext=(-5 if left else 5, 3),
            textcoords="offset points",
            horizontalalignment="right" if left else "left",
            color=svg.INK,
            fontsize=8,
        )


def _showable(values: np.ndarray, scale: str) -> np.ndarray:
    """Returns which values a scale can show, bool [n]."""
    shown = np.isfinite(values)
    if scale in ("log", "logit"):
        shown &= values > 0
    if scale == "logit":
        shown &= values < 1
    return shown


def _set_ticks(axis, about: Axis, limits: tuple[float, float]) -> None:
    if not about.ticks and about.scale == "linear":
        svg.number_ticks(axis, percent=about.percent)
        return
    low, high = limits
    ticks = about.ticks or _scale_ticks(about.scale, low, high)
    ticks = [tick for tick in ticks if low <= tick <= high]
    axis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // _MOST_TICKS) or 1]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: svg.tick(value, about.percent)))


def _scale_ticks(scale: str, low: float, high: float) -> Sequence[float]:
    if scale == "logit":
        return _LOGIT_TICKS
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    for parts in ((1,), (1, 3), (1, 2, 5)):
        ticks = np.multiply.outer(decades, parts).reshape(-1)
        if ((ticks >= low) & (ticks <= high)).sum() > 3:
            return ticks.tolist()
    return list(MaxNLocator(4).tick_values(low, high))
