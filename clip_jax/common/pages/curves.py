"""Learning curves: metrics over the steps of a run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from markupsafe import Markup

from clip_jax.common.pages import svg

_POINTS = 300  # longer series are averaged to this many, to keep the page small
_MARKED = 25  # a series this short gets a mark at every point


@dataclass(frozen=True)
class Series:
    """One metric over a run.

    Attributes:
      label: name of the metric.
      steps: ascending.
      values: the metric at each step, NaN where it is not finite.
      chance: level of guessing; None: not known.
    """

    label: str
    steps: Int[np.ndarray, " n"]
    values: Float[np.ndarray, " n"]
    chance: float | None = None

    @property
    def first(self) -> float:
        return float(self.values[0])

    @property
    def last(self) -> float:
        return float(self.values[-1])


def collect(
    history: Iterable[Mapping[str, float]], chance: Mapping[str, float]
) -> dict[str, Series]:
    """Collects rows of metrics into one series per metric, in order of first appearance.

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


def draw(series: Sequence[Series], label: str, *, percent: bool = False) -> Markup:
    """Draws all series in one pair of axes, as an <svg> element.

    Args:
      series: at least one; each gets the dash and colour of its position.
      label: accessible name, plain text.
      percent: whether values are fractions, shown as percentages from zero.
    """
    axes = svg.new_axes()
    for index, one in enumerate(series):
        _draw_series(axes, one, index)
    if len(steps := {step for one in series for step in one.steps.tolist()}) == 1:
        axes.set_xlim(0, 1.05 * max(1, *steps))
    svg.style(axes)
    svg.number_ticks(axes.xaxis, integer=True)
    svg.number_ticks(axes.yaxis, percent=percent)
    if percent:
        axes.set_ylim(0, max(0.01, min(1.02, 1.05 * axes.get_ylim()[1])))
    return svg.render(axes, label, " ".join(one.label for one in series))


def _draw_series(axes, series: Series, index: int) -> None:
    colour = svg.colour(index)
    steps, mean, low, high = thin(series.steps, series.values)
    if len(steps) < len(series.steps):
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(
        steps,
        mean,
        color=colour,
        linewidth=1.6,
        linestyle=svg.dash(index),
        marker="o" if len(steps) <= _MARKED else None,
        markersize=3.5,
    )
    if series.chance is not None:
        axes.axhline(series.chance, color=colour, linewidth=1, linestyle=(0, (1, 3)))


def thin(
    steps: Int[np.ndarray, " n"], values: Float[np.ndarray, " n"]
) -> tuple[
    Int[np.ndarray, " groups"],
    Float[np.ndarray, " groups"],
    Float[np.ndarray, " groups"],
    Float[np.ndarray, " groups"],
]:
    """Averages a long series in neighbouring groups.

    Returns:
      The last step, mean, lowest and highest value of each group.
    """
    if len(steps) <= _POINTS:
        return steps, values, values, values
    starts = np.linspace(0, len(steps), _POINTS, endpoint=False).astype(np.int64)
    there = np.isfinite(values)
    # A group without any finite value divides 0 by 0: the NaN is the gap wanted in the line.
    with np.errstate(invalid="ignore"):
        mean = np.add.reduceat(np.where(there, values, 0), starts) / np.add.reduceat(
            there, starts, dtype=np.int64
        )
    # The last step of each group, for the curve to end where the run did.
    ends = np.append(starts[1:], len(steps)) - 1
    low, high = np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)
    return steps[ends], mean, low, high
