"""A run beside a reference, as a page with all curves."""

from pathlib import Path

from etils import epath
from matplotlib.ticker import FuncFormatter, MaxNLocator

from clip_jax.common.pages import page, svg
from clip_jax.common.pages.svg import Line, Panel
from clip_jax.status import check_text
from clip_jax.status.bands import Compared, Verdict
from clip_jax.status.reference import Reference
from clip_jax.status.run import Run


def write(path: epath.PathLike, run: Run, reference: Reference, verdict: Verdict) -> None:
    """Writes a page.

    Args:
      path: file to write; local, gs:// or s3://.
      run: the run.
      reference: what it was compared with.
      verdict: the result.
    """
    page.write(
        path,
        Path(__file__).with_name("check_curve.html.jinja"),
        title=f"{run.name} beside the reference {reference.name}",
        now=run.now,
        sentence=check_text.sentence(run.name, reference, verdict),
        reference=reference,
        panels=[_panel(one) for one in verdict.metrics],
    )


def _panel(one: Compared) -> Panel:
    """Draws a curve over its band, with a mark at each window outside."""
    axes = svg.new_axes()
    finite = one.distances < float("inf")
    axes.fill_between(one.ends, one.low, one.high, color=svg.colour(1), alpha=0.25, linewidth=0)
    axes.plot(one.ends[finite], one.values[finite], color=svg.colour(0), linewidth=1.6)
    outside = one.outside & finite
    marks = one.ends[outside], one.values[outside]
    axes.plot(*marks, "o", color=svg.colour(0), markersize=4, clip_on=False)
    svg.style(axes)
    form = check_text.show(one.metric)
    svg.number_ticks(axes.xaxis, integer=True)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    title = check_text.title(one.metric)
    told = "within the band" if one.first is None else check_text.departure(one)
    legend = [Line("this run", form(one.values[-1])), Line("the band")]
    return Panel(title, svg.render(axes, f"{title}: {told}", one.metric), legend, told)
