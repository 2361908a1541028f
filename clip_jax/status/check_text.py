"""A run beside a reference, as text for a terminal."""

from collections.abc import Callable, Sequence

from clip_jax.common.formatting import aligned, percent, short
from clip_jax.status import chart
from clip_jax.status.bands import Compared, Verdict
from clip_jax.status.look import Look
from clip_jax.status.reference import Reference

_NAMES = {
    "train/loss": "loss",
    "train/grad_norm/image": "gradient norm of the image tower",
    "train/grad_norm/text": "gradient norm of the text tower",
    "train/logit_scale": "logit scale",
}
_HEIGHT = 12  # lines of the plot


def title(metric: str) -> str:
    """Returns the name of a metric within a sentence."""
    return _NAMES.get(metric, metric)


def show(metric: str) -> Callable[[float], str]:
    """Returns the format of a metric's values."""
    return short if metric.startswith("train/") else percent


def sentence(name: str, reference: Reference, verdict: Verdict) -> str:
    """Says whether a run matches, or where it left the band first and in what."""
    last = max(steps[-1] for steps in reference.steps.values())
    if (first := verdict.first) is not None:
        others = [one for one in verdict.metrics if one is not first and one.first is not None]
        names = _listed([title(one.metric) for one in others])
        also = f" Outside as well, then or later: {names}." if others else ""
        return (
            f"{name} does not match the reference {reference.name}: it leaves the band of "
            f"{len(reference.runs)} seeds first {departure(first)}.{also}"
        )
    if not verdict.complete:
        return (
            f"{name} matches the reference {reference.name} as far as it goes, up to step "
            f"{verdict.reached:,} of {last:,}. Let it run to its end, and check again."
        )
    return (
        f"{name} matches the reference {reference.name}: up to its end at step {last:,}, all "
        f"{len(verdict.metrics)} curves lie within the band of {len(reference.runs)} seeds."
    )


def departure(one: Compared) -> str:
    """Says when and how a metric left the band."""
    assert one.first is not None
    i, form = one.first, show(one.metric)
    start, end = one.starts[i], one.ends[i]
    when = f"at step {end:,}" if start == end else f"in steps {start:,} to {end:,}"
    return (
        f"{when}, in its {title(one.metric)}: {form(one.values[i])}, where the band is "
        f"{form(one.low[i])} to {form(one.high[i])}"
    )


def page(name: str, reference: Reference, verdict: Verdict, look: Look) -> str:
    """Describes a run beside a reference: a sentence, a table, and the plot that matters."""
    first = verdict.first
    tone = "bad" if first else "good" if verdict.complete else "warn"
    told = [look.paint(line, tone) for line in look.wrap(sentence(name, reference, verdict), 0)]
    shown = first or verdict.metrics[0]
    return "\n".join([*told, "", *_table(verdict), "", *_plot(shown, look)])


def _table(verdict: Verdict) -> Sequence[str]:
    rows = [["curve", "within", "of", "first outside", "farthest", "there", "band"]]
    for one in verdict.metrics:
        far = int(one.distances.argmax())
        form = show(one.metric)
        rows.append(
            [
                title(one.metric),
                f"{(~one.outside).sum()}",
                f"{len(one.outside)}",
                "" if one.first is None else f"step {one.ends[one.first]:,}",
                f"step {one.ends[far]:,}",
                form(one.values[far]),
                f"{form(one.low[far])} to {form(one.high[far])}",
            ]
        )
    return aligned(rows, "<>>>>>>").splitlines()


def _plot(one: Compared, look: Look) -> list[str]:
    """Draws a curve over the edges of its band."""
    series = [dict(zip(one.ends.tolist(), values)) for values in (one.values, one.low, one.high)]
    lettered = not (look.unicode and look.colour)
    marks = [chart.mark(i) if lettered else "●" for i in range(3)]
    run, low, high = (look.paint(mark, i) for i, mark in enumerate(marks))
    legend = f"{look.paint(title(one.metric), 'strong')}: {run} this run, {low} and {high} the band"
    return [legend, *chart.draw(series, look, _HEIGHT, show(one.metric))]


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
