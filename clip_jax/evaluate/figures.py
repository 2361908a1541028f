"""The paper's figures for the results of one model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clip_jax.common.formatting import percent, short
from clip_jax.common.pages import charts
from clip_jax.common.pages.charts import Axis, Points
from clip_jax.common.pages.svg import Line, Panel
from clip_jax.evaluate.measures import robustness as robust
from clip_jax.evaluate.measures import sweep
from clip_jax.evaluate.measures.overlap import Overlap
from clip_jax.evaluate.results import Result
from clip_jax.evaluate.tasks.zeroshot import BARE, ENSEMBLE, SINGLE


def legend(points: Sequence[Points]) -> list[Line]:
    """Returns the legend of the series, in their order."""
    return [Line(each.label, joined=each.joined, quiet=each.quiet) for each in points]


def averaged(results: Sequence[Result]) -> list[Result]:
    """Returns the results that a mean is taken over: no shifts, unless there is nothing else."""
    return [result for result in results if not result.base] or list(results)


def prompting(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Returns the mean score over the data sets by prompts (paper figure 4).

    Returns:
      "variant", "value" and "gain" over bare names, of each variant; nothing where there is only
      one.
    """
    variants = (BARE, SINGLE, ENSEMBLE)
    by_variant: dict[str, list[float]] = {name: [] for name in variants}
    for result in averaged(results):
        for score in result.scores:
            if score.metric == result.headline.metric:
                by_variant[score.variant].append(score.value)
    if not by_variant[BARE]:
        return []
    means = {name: float(np.mean(values)) for name, values in by_variant.items()}
    return [
        {"variant": name, "value": means[name], "gain": means[name] - means[BARE]}
        for name in variants
    ]


def strengths(result: Result) -> Panel:
    """Draws the score on validation data by L2 strength."""
    details = result.details
    tried = sorted(details["points"])
    points = [
        Points("validation", [p[0] for p in tried], [p[1] for p in tried], joined=True),
        Points("chosen", [details["strength"]], [details["validation_score"]]),
    ]
    x, y = Axis("L2 strength (1/C)", "log"), Axis("score on validation", percent=True)
    label = f"{result.title}: chosen {short(details['strength'])}"
    note = f"{details['train']:,} examples and {details['validation']:,} for validation. "
    note += sweep.warning(details.get("unconverged", 0))  # not in results of earlier versions
    return Panel(result.title, charts.draw(points, x, y, label), legend(points), note.strip())


def few_shot(result: Result) -> Panel:
    """Draws probes by examples per class, beside zero-shot (paper figure 6)."""
    details = result.details
    shots = details["shots"]
    points = [
        Points(
            "linear probe",
            shots,
            details["mean"],
            low=[m - s for m, s in zip(details["mean"], details["deviation"])],
            high=[m + s for m, s in zip(details["mean"], details["deviation"])],
            joined=True,
        ),
        Points("zero-shot", shots, [details["zero_shot"]] * len(shots), joined=True, marked=False),
    ]
    note = f"{_labels_note(details)} {sweep.warning(details.get('unconverged', 0))}"
    return _shots_panel(result.title, points, shots, note.strip())


def few_shot_mean(results: Sequence[Result]) -> Panel:
    """Draws probes by examples per class, in the mean over data sets."""
    shots = sorted(set.intersection(*(set(result.details["shots"]) for result in results)))
    means = [
        np.mean([r.details["mean"][r.details["shots"].index(shot)] for r in results])
        for shot in shots
    ]
    zero = float(np.mean([result.details["zero_shot"] for result in results]))
    points = [
        Points("linear probe", shots, means, joined=True),
        Points("zero-shot", shots, [zero] * len(shots), joined=True, marked=False),
    ]
    needed = [needs(result.details) for result in results]
    note = (
        f"Examples per class that a probe needs to be as good as zero-shot: median "
        f"{short(float(np.median(needed)))}, mean {short(float(np.mean(needed)))}."
    )
    return _shots_panel(f"Mean of {len(results)} data sets", points, shots, note)


def _shots_panel(title: str, points: list[Points], shots: Sequence[int], note: str) -> Panel:
    x = Axis("examples per class", "log", ticks=tuple(shots))
    svg = charts.draw(points, x, Axis("score", percent=True), f"{title}: {note}")
    return Panel(title, svg, legend(points), note)


def needs(details: Mapping[str, Any]) -> float:
    """Returns the examples per class that equal zero-shot; infinity: not even all of them do."""
    value = details["labels_needed"]
    return math.inf if value is None else value


def _labels_note(details: Mapping[str, Any]) -> str:
    needed = needs(details)
    if needed == math.inf:
        return "All training examples do not make a probe as good as zero-shot."
    return f"A probe is as good as zero-shot with {short(needed)} examples per class."


def robustness(result: Result) -> list[Panel]:
    """Draws accuracy on each shift against that on the reference set (paper figure 13).

    A shift for which no other models are known has no figure; its row in the table says it all.
    """
    rows, testbed = result.details["rows"], result.details["testbed"]
    names = [name for name in dict.fromkeys(row["name"] for row in rows) if name in testbed]
    return [
        _shift(result.title, [row for row in rows if row["name"] == name], testbed[name])
        for name in names
    ]


def _shift(
    reference: str, rows: Sequence[Mapping[str, Any]], others: Sequence[Sequence[float]]
) -> Panel:
    x, y = np.array(others).T
    trend = robust.fit(x, y)
    ends = np.linspace(x.min(), x.max(), 50)
    points = [Points(row["classifier"], [row["reference"]], [row["shifted"]]) for row in rows]
    points += [
        Points("other models", x, y, quiet=True),
        Points("trend", ends, trend.predict(ends), joined=True, marked=False, quiet=True),
    ]
    title = rows[0]["shift"]
    gains = ", ".join(f"{row['classifier']} {percent(row['effective'])}" for row in rows)
    note = f"Effective robustness, accuracy above the trend of {len(x)} models: {gains}."
    axes = (
        Axis(f"{reference}, same classes", "logit", percent=True),
        Axis(title, "logit", percent=True),
    )
    svg = charts.draw(points, *axes, f"{title} against {reference}", diagonal=True)
    return Panel(title, svg, legend(points), note)


def overlaps(rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Draws what overlap adds to accuracy, by the fraction that overlaps (paper figure 17)."""
    found: list[Overlap] = [each["row"] for each in rows]
    points = Points(
        "data sets",
        [row.fraction for row in found],
        [row.overlap.value - row.clean.value for row in found],
        low=[row.overlap.low - row.clean.value for row in found],
        high=[row.overlap.high - row.clean.value for row in found],
        names=[each["result"].title for each in rows],
    )
    if not any(row.overlap.trials and row.clean.trials for row in found):
        return []
    x = Axis("fraction of images that overlap", percent=True)
    y = Axis("accuracy, overlap minus clean", percent=True)
    svg = charts.draw([points], x, y, "Difference in accuracy by overlap")
    return [Panel("Does overlap help?", svg, [], "Bars: intervals of the overlapping part.")]
