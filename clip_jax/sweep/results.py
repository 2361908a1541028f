"""Compute, loss and error of the finished runs of a sweep, as a table and as laws."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from clip_jax import models
from clip_jax.common import metric_rows
from clip_jax.common.formatting import aligned, percent, short
from clip_jax.errors import UserError
from clip_jax.models import flops
from clip_jax.sweep import law
from clip_jax.sweep.grid import GridRun
from clip_jax.sweep.law import Law

_TAIL = 0.1  # last part of a run over which a metric of training is averaged
_SEED = "seed"
_BEST = "* no run with as much compute or less is better"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A run as it ended; runs that differ in the seed alone are one.

    Attributes:
      name: name of the run, of several seeds that of the first.
      values: its values of the grid, by setting, without the seed.
      pairs: image-text pairs seen.
      compute: operations of the training; multiplications and additions count apart.
      scores: by metric, the loss, or the error of a score; of several seeds their mean.
      spread: by metric, the standard deviation over the seeds; NaN: there is one.
      seeds: number of seeds.
    """

    name: str
    values: Mapping[str, str]
    pairs: int
    compute: float
    scores: Mapping[str, float]
    spread: Mapping[str, float]
    seeds: int


@dataclasses.dataclass(frozen=True)
class Study:
    """The best runs by one metric, and their law.

    Attributes:
      metric: name of the metric.
      best: positions of the runs that no other beats with as much compute or less.
      law: law of the best; None: there are too few.
      shortage: why there is no law; "": there is one.
    """

    metric: str
    best: Sequence[int]
    law: Law | None
    shortage: str


def read(run: GridRun, place: epath.Path, metrics: Sequence[str]) -> Outcome:
    """Reads a finished run.

    Raises:
      UserError: it has no such metric, or one that is neither a loss nor a fraction.
    """
    rows, _ = metric_rows.read(place)
    config = run.config
    steps = max((int(row["step"]) for row in rows), default=0)
    size = models.get_size(config.model.name, config.model.size.to_dict())
    each = flops.step_flops(size, config.batch_size, config.data.captions)
    return Outcome(
        name=run.name,
        values={name: value for name, value in run.values.items() if name != _SEED},
        pairs=steps * config.batch_size,
        compute=each * steps,
        scores={metric: _score(rows, metric, steps, place) for metric in metrics},
        spread=dict.fromkeys(metrics, math.nan),
        seeds=1,
    )


def default_metrics(run: GridRun, place: epath.Path) -> list[str]:
    """Returns the metrics to report of a run where none are named."""
    best = run.config.checkpoint.best_metric
    rows, _ = metric_rows.read(place)
    return ["train/loss", *[best] * any(best in row for row in rows)]


def is_loss(metric: str) -> bool:
    """Returns whether less is better, as it stands; else the metric is a score, from 0 to 1."""
    return metric.rpartition("/")[2].endswith("loss")


def title(metric: str) -> str:
    """Returns what is told of a metric: the loss, or the error of a score."""
    return metric if is_loss(metric) else f"1 - {metric}"


def shown(metric: str, value: float) -> str:
    """Formats a loss or an error."""
    return short(value) if is_loss(metric) else percent(value)


def _score(
    rows: Sequence[Mapping[str, float]], metric: str, steps: int, place: epath.Path
) -> float:
    found = [(row["step"], row[metric]) for row in rows if metric in row]
    if not found:
        names = sorted({name for row in rows for name in row if _may_be_fitted(name)})
        raise UserError(
            f"The run {place} has no metric {metric}: give --fit=METRIC, one of "
            f"{', '.join(names) or 'those that its evaluations log'}."
        )
    tail = [value for step, value in found if step > (1 - _TAIL) * steps] or [found[-1][1]]
    value = statistics.fmean(tail) if metric.startswith("train/") else found[-1][1]
    if is_loss(metric):
        return value
    if not 0 <= value <= 1:
        raise UserError(
            f"{metric} of the run {place} is {short(value)}, neither a loss nor a fraction: its "
            "error is not known. Give --fit a score from 0 to 1, or a loss."
        )
    return 1 - value


def _may_be_fitted(name: str) -> bool:
    leaf = name.rpartition("/")[2]
    return is_loss(name) or leaf.startswith(("top", "recall@", "mean"))


def merge_seeds(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Joins the runs that differ in the seed alone, and sorts by compute."""
    groups: dict[tuple, list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault(tuple(one.values.items()), []).append(one)
    merged = []
    for group in groups.values():
        means, spread = {}, {}
        for metric in group[0].scores:
            values = [one.scores[metric] for one in group]
            means[metric] = statistics.fmean(values)
            spread[metric] = statistics.stdev(values) if len(values) > 1 else math.nan
        merged.append(dataclasses.replace(group[0], scores=means, spread=spread, seeds=len(group)))
    return sorted(merged, key=lambda one: one.compute)


def study(outcomes: Sequence[Outcome], metric: str) -> Study:
    """Finds the best runs by one metric, and fits a law to them."""
    usable = [i for i, one in enumerate(outcomes) if 0 < one.scores[metric] < math.inf]
    compute = np.array([outcomes[i].compute for i in usable])
    value = np.array([outcomes[i].scores[metric] for i in usable])
    best = law.frontier(compute, value)
    shortage = law.shortage(compute[best])
    fitted = None if shortage else law.fit(compute[best], value[best])
    return Study(metric, [usable[i] for i in best], fitted, shortage)


def table(outcomes: Sequence[Outcome], studies: Sequence[Study]) -> str:
    """Returns the runs as a table, and a sentence on each law."""
    several = any(one.seeds > 1 for one in outcomes)
    names = list(outcomes[0].values) if outcomes else []
    head = [*(name.rpartition(".")[2] for name in names), *["seeds"] * several, "pairs", "FLOPs"]
    rows = [[*head, *(title(one.metric) for one in studies)]]
    for i, one in enumerate(outcomes):
        cells = [*one.values.values(), *[str(one.seeds)] * several]
        cells += [f"{one.pairs:,}", f"{one.compute:.3g}"]
        rows.append([*cells, *(_cell(one, i, each) for each in studies)])
    lines = [aligned(rows, ">" * len(rows[0])), f"\n{_BEST}\n", *map(sentence, studies)]
    return "\n".join(lines)


def _cell(one: Outcome, position: int, found: Study) -> str:
    text = shown(found.metric, one.scores[found.metric])
    if math.isfinite(spread := one.spread[found.metric]):
        text += f" ±{shown(found.metric, spread)}"
    return text + (" *" if position in found.best else "  ")


def sentence(found: Study) -> str:
    """Returns a sentence on a law, or on why there is none."""
    if found.law is None:
        return f"{title(found.metric)}: not fitted, since {found.shortage}."
    one = found.law
    low, high = one.exponent_interval
    formula = f"{one.constant:.3g} C^-{one.exponent:.3f}"
    within = f"exponent {low:.3f} to {high:.3f}"
    if one.floor:
        formula = f"{one.floor:.3g} + {formula}"
        within += ", floor {:.3g} to {:.3g}".format(*one.floor_interval)
    trend = "" if low > 0 else " The interval includes 0: these runs do not tell an exponent."
    return (
        f"{title(found.metric)} = {formula} over the {one.points} best ({within}: "
        f"{law.CONFIDENCE:.0%} intervals from the residuals, whose standard deviation is "
        f"{one.deviation:.1%}).{trend}"
    )
