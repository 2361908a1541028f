"""Loss and error against compute as a picture."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from clip_jax.sweep import results
from clip_jax.sweep.results import Outcome, Study

_MARKS = "os^Dv<>P*X"


def draw(outcomes: Sequence[Outcome], studies: Sequence[Study]) -> bytes:
    """Draws each metric over compute, both logarithmic, as a PNG.

    Runs with the same value of the first setting of the grid are a line.
    """
    picture = Figure(figsize=(4.8 * len(studies), 3.8), layout="constrained")
    FigureCanvasAgg(picture)
    for axes, found in zip(picture.subplots(1, len(studies), squeeze=False)[0], studies):
        _draw(axes, outcomes, found)
    file = io.BytesIO()
    picture.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _draw(axes: Axes, outcomes: Sequence[Outcome], found: Study) -> None:
    lines: dict[str, list[Outcome]] = {}
    for one in outcomes:
        name, value = next(iter(one.values.items()), ("run", one.name))
        lines.setdefault(f"{name.rpartition('.')[2]} {value}", []).append(one)
    for position, (label, line) in enumerate(lines.items()):
        x, y = [one.compute for one in line], [one.scores[found.metric] for one in line]
        mark = _MARKS[position % len(_MARKS)]
        spread = np.nan_to_num([one.spread[found.metric] for one in line])
        axes.errorbar(x, y, spread, marker=mark, markersize=5, linewidth=1, label=label)
    if found.law is not None:
        first, last = (outcomes[i].compute for i in (found.best[0], found.best[-1]))
        x = np.geomspace(first, last, 50)
        low, high = found.law.exponent_interval
        label = f"exponent {found.law.exponent:.2f} ({low:.2f} to {high:.2f})"
        axes.plot(x, found.law.predict(x), "k--", linewidth=1, label=label)
    axes.set(
        xscale="log", yscale="log", xlabel="training FLOPs", ylabel=results.title(found.metric)
    )
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(FuncFormatter(lambda value, _: results.shown(found.metric, value)))
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        if high > 10 * low:  # labels between the powers of ten would overlap
            axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
