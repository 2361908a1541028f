"""Several models side by side: tables, and the paper's figures over models."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clip_jax.common.formatting import aligned, percent, short
from clip_jax.common.pages import charts
from clip_jax.common.pages.charts import Axis, Points
from clip_jax.common.pages.svg import Panel
from clip_jax.errors import UserError
from clip_jax.evaluate import tasks
from clip_jax.evaluate.figures import legend
from clip_jax.evaluate.measures import robustness
from clip_jax.evaluate.measures.lines import fit_power_law
from clip_jax.evaluate.results import Evaluation, Result, Score
from clip_jax.evaluate.tasks.zeroshot import BARE, ENSEMBLE

_NBSP = "\N{NO-BREAK SPACE}"


@dataclasses.dataclass(frozen=True)
class Compared:
    """One of the models.

    Attributes:
      name: name to show.
      evaluation: its evaluation; None: it was not evaluated.
      curve: images processed and zero-shot accuracy over its training; may be empty.
      published: whether these are figures of the paper.
    """

    name: str
    evaluation: Evaluation | None
    curve: Sequence[tuple[float, float]]
    published: bool = False

    def headlines(self, task: str) -> dict[str, Score]:
        """Returns the scores to quote, by data set; of robustness by shift and classifier."""
        results = self.evaluation.of(task) if self.evaluation else []
        if task == "robustness":
            scores = [score for result in results for score in result.scores[1:]]
            return {f"{s.dataset}, {s.variant}": s for s in scores if "reference" not in s.variant}
        return {result.dataset: result.headline for result in results}


@dataclasses.dataclass(frozen=True)
class Table:
    """Scores of a task: a row for each data set, a column for each model.

    Attributes:
      title: title of the task.
      models: names of the columns.
      rows: title of each data set, and its scores; None: there is none.
      means: means over the data sets that all models have; empty where there are fewer than two.
      common: number of these data sets.
    """

    title: str
    models: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Score | None, ...]], ...]
    means: tuple[float, ...]
    common: int


def tables(found: Sequence[Compared]) -> list[Table]:
    """Returns a table for each task that any model has a score of."""
    made = []
    for task in tasks.NAMES:
        columns = [one for one in found if one.headlines(task)]
        if not columns:
            continue
        scores = {one.name: one.headlines(task) for one in columns}
        names = list(dict.fromkeys(name for each in scores.values() for name in each))
        titles = _titles(columns)
        rows = [
            (_title(name, titles), tuple(scores[one.name].get(name) for one in columns))
            for name in names
        ]
        common = [name for name in names if all(name in scores[one.name] for one in columns)]
        means = [np.mean([scores[one.name][name].value for name in common]) for one in columns]
        several = len(common) > 1
        made.append(
            Table(
                title=tasks.get(task).title,
                models=tuple(one.name for one in columns),
                rows=tuple(rows),
                means=tuple(map(float, means)) if several else (),
                common=len(common),
            )
        )
    return made


def _titles(found: Sequence[Compared]) -> dict[str, str]:
    """Returns titles of the data sets, by name."""
    results = [result for one in found if one.evaluation for result in one.evaluation.results]
    return {result.dataset: result.title for result in results}


def _title(name: str, titles: Mapping[str, str]) -> str:
    """Returns the title of a row, named by a data set, or by one and a classifier."""
    dataset, comma, rest = name.partition(", ")
    return titles.get(dataset, dataset) + comma + rest


def as_text(table: Table) -> str:
    """Formats a table for the terminal."""
    lines = [(table.title, *table.models)]
    lines += [
        (title, *("–" if score is None else percent(score.value) for score in scores))
        for title, scores in table.rows
    ]
    if table.means:
        lines.append((f"mean of {table.common}", *map(percent, table.means)))
    return aligned(lines, "<" + ">" * len(table.models)).replace(_NBSP, " ")


def panels(found: Sequence[Compared]) -> list[Panel]:
    """Draws the figures that these models allow."""
    candidates = [
        learning(found),
        by_compute(found, "zeroshot", "Zero-shot against compute"),
        power_law(found),
        by_compute(found, "linear_probe", "Linear probe against compute"),
        prompting(found),
        zeroshot_against_probe(found),
        *shifts(found),
    ]
    return [panel for panel in candidates if panel is not None]


def learning(found: Sequence[Compared]) -> Panel | None:
    """Draws zero-shot accuracy against images processed (paper figure 2)."""
    curves = [one for one in found if one.curve]
    if not curves:
        return None
    points = [Points(one.name, *zip(*one.curve), joined=True) for one in curves]
    x, y = Axis("images processed"), Axis("zero-shot accuracy", percent=True)
    title = "Zero-shot accuracy against images processed"
    return Panel(title, charts.draw(points, x, y, title), legend(points), "Paper figure 2.")


def curve_rows(found: Sequence[Compared]) -> list[dict[str, Any]]:
    """Computes the images that each run took to reach the level the worst run ended at.

    The fastest comes first. There are no rows where there are no runs to compare.
    """
    curves = {one.name: one.curve for one in found if one.curve}
    if len(curves) < 2:
        return []
    level = min(max(value for _, value in curve) for curve in curves.values())
    needed = {name: images_to_reach(curve, level) for name, curve in curves.items()}
    slowest = max(needed.values())
    return [
        {
            "name": name,
            "level": level,
            "images": images,
            "times": slowest / images if images else float("nan"),
            "final": curves[name][-1][1],
        }
        for name, images in sorted(needed.items(), key=lambda item: item[1])
    ]


def images_to_reach(curve: Sequence[tuple[float, float]], level: float) -> float:
    """Interpolates the images processed when an accuracy was first reached; NaN: never."""
    before = (0.0, 0.0)
    for images, value in curve:
        if value >= level:
            fraction = (level - before[1]) / (value - before[1]) if value > before[1] else 1.0
            return before[0] + fraction * (images - before[0])
        before = images, value
    return float("nan")


def common_means(found: Sequence[Compared], task: str) -> dict[str, float]:
    """Computes the mean score of each model over the data sets that all of them have.

    Where there are none, the models with the fewest data sets are left out until there are some.
    """
    scores = {one.name: one.headlines(task) for one in found if one.headlines(task)}
    while scores and not (shared := set.intersection(*map(set, scores.values()))):
        del scores[min(scores, key=lambda name: len(scores[name]))]
    return {
        name: float(np.mean([each[dataset].value for dataset in shared]))
        for name, each in scores.items()
    }


def _flops(found: Sequence[Compared]) -> dict[str, float]:
    return {one.name: one.evaluation.model.image_flops / 1e9 for one in found if one.evaluation}


def _by_family(found: Sequence[Compared], names: Sequence[str]) -> dict[str, list[str]]:
    """Groups the models by kind of image tower; each kind is a line of its own."""
    kinds: dict[str, list[str]] = {}
    for one in found:
        if one.evaluation and one.name in names:
            resnet = one.evaluation.model.name.startswith(("RN", "ResNet"))
            kinds.setdefault("ResNets" if resnet else "ViTs", []).append(one.name)
    flops = _flops(found)
    return {kind: sorted(members, key=flops.__getitem__) for kind, members in kinds.items()}


def by_compute(found: Sequence[Compared], task: str, title: str) -> Panel | None:
    """Draws the mean score against operations per image (paper figure 10)."""
    means, flops = common_means(found, task), _flops(found)
    if len(means) < 2:
        return None
    points = [
        Points(kind, [flops[n] for n in names], [means[n] for n in names], names=names, joined=True)
        for kind, names in _by_family(found, list(means)).items()
    ]
    x, y = Axis("GFLOP per image", "log"), Axis("mean score", percent=True)
    return Panel(title, charts.draw(points, x, y, title), legend(points))


def power_law(found: Sequence[Compared]) -> Panel | None:
    """Fits mean zero-shot error as a power of compute, for each family (paper figure 9)."""
    means, flops = common_means(found, "zeroshot"), _flops(found)
    points, notes = [], []
    for kind, names in _by_family(found, list(means)).items():
        x, y = (np.array([each[n] for n in names]) for each in (flops, means))
        points.append(Points(kind, x, 1 - y, names=names))
        if len(set(x)) < 2:
            continue
        law = fit_power_law(x, 1 - y)
        ends = np.geomspace(x.min(), x.max(), 30)
        line = law.constant * ends**law.exponent
        points.append(Points(f"{kind}, fit", ends, line, joined=True, marked=False, quiet=True))
        low, high = law.exponent_interval
        within = f" ({low:.3f} to {high:.3f})" if np.isfinite(low) else ""
        notes.append(f"{kind}: error falls as compute to the power {law.exponent:.3f}{within}.")
    if not notes:
        return None
    x_axis, y_axis = (
        Axis("GFLOP per image", "log"),
        Axis("mean zero-shot error", "log", percent=True),
    )
    title = "Error against compute"
    svg = charts.draw(points, x_axis, y_axis, title)
    return Panel(title, svg, legend(points), " ".join(notes))


def prompting(found: Sequence[Compared]) -> Panel | None:
    """Draws bare names against the ensemble of prompts, by compute (paper figure 4)."""
    rows = []
    for one in found:
        if one.evaluation is None or one.published:
            continue
        values: dict[str, list[float]] = {BARE: [], ENSEMBLE: []}
        for result in one.evaluation.of("zeroshot"):
            for score in result.scores:
                if score.variant in values and score.metric == result.headline.metric:
                    values[score.variant].append(score.value)
        if values[BARE]:
            flops = one.evaluation.model.image_flops / 1e9
            rows.append((flops, one.name, np.mean(values[ENSEMBLE]), np.mean(values[BARE])))
    if not rows:
        return None
    flops, names, ensemble, bare = zip(*sorted(rows))
    points = [
        Points("ensemble of prompts", flops, ensemble, names=names, joined=True),
        Points("bare class names", flops, bare, joined=True),
    ]
    x, y = Axis("GFLOP per image", "log"), Axis("mean score", percent=True)
    title = "What prompts add"
    return Panel(title, charts.draw(points, x, y, title), legend(points), "Paper figure 4.")


def zeroshot_against_probe(found: Sequence[Compared]) -> Panel | None:
    """Draws zero-shot against probe: a point for each data set, a mark for each model."""
    points = []
    for one in found:
        zero, probe = one.headlines("zeroshot"), one.headlines("linear_probe")
        shared = [name for name in zero if name in probe]
        if shared:
            points.append(
                Points(one.name, [probe[n].value for n in shared], [zero[n].value for n in shared])
            )
    if not points:
        return None
    x, y = Axis("linear probe", percent=True), Axis("zero-shot", percent=True)
    title = "Zero-shot against linear probe"
    svg = charts.draw(points, x, y, title, diagonal=True)
    return Panel(title, svg, legend(points), "Each mark is a data set.")


def shifts(found: Sequence[Compared]) -> list[Panel]:
    """Draws accuracy under shift against the reference's, over models (paper figure 13)."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for one in found:
        results: list[Result] = one.evaluation.of("robustness") if one.evaluation else []
        for row in (row for result in results for row in result.details["rows"]):
            rows.setdefault(row["shift"], []).append({**row, "model": one.name})
    made = [_shift(name, own) for name, own in rows.items()]
    return [panel for panel in made if panel is not None]


def _shift(name: str, rows: Sequence[Mapping[str, Any]]) -> Panel | None:
    if len({row["model"] for row in rows}) < 2:
        return None
    points, note = [], ""
    for classifier in dict.fromkeys(row["classifier"] for row in rows):
        own = [row for row in rows if row["classifier"] == classifier]
        x, y = (np.array([row[key] for row in own]) for key in ("reference", "shifted"))
        points.append(Points(classifier, x, y, names=[row["model"] for row in own]))
        try:
            trend = robustness.fit(x, y)
        except UserError:  # too few that are neither perfect nor hopeless
            continue
        ends = np.linspace(x.min(), x.max(), 30)
        points.append(
            Points(
                f"{classifier}, trend",
                ends,
                trend.predict(ends),
                joined=True,
                marked=False,
                quiet=True,
            )
        )
        note += f"{classifier}: slope {short(trend.line.slope)} in log-odds. "
    x_axis, y_axis = Axis("reference", "logit", percent=True), Axis(name, "logit", percent=True)
    svg = charts.draw(points, x_axis, y_axis, name, diagonal=True)
    return Panel(name, svg, legend(points), note.strip())
