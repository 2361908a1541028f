"""Pages of results: report.html of an evaluation, its sections, pairs of overlapping images."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from clip_jax.common.pages import page
from clip_jax.common.pages.pictures import Thumbnail
from clip_jax.evaluate import confusion, figures, tasks
from clip_jax.evaluate.measures import overlap
from clip_jax.evaluate.measures.intervals import Proportion
from clip_jax.evaluate.results import Evaluation, Result, Score

TEMPLATES = Path(__file__).parent  # sections.html.jinja among them


def write(directory: epath.Path, evaluation: Evaluation) -> list[epath.Path]:
    """Writes all pages of an evaluation; returns their paths, that of the report first."""
    path = directory / "report.html"
    page.write(
        path,
        TEMPLATES / "report.html.jinja",
        title=f"{evaluation.model.name}: evaluation",
        evaluation=evaluation,
        model=evaluation.model,
        sections=sections(evaluation.results),
        stats=_stats(evaluation),
        summary=_summary(evaluation),
    )
    return [path, *(_write_pairs(directory, result) for result in evaluation.of("overlap"))]


def sections(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Returns a section for each task that has results, as sections.html.jinja shows it."""
    found = []
    for name, view in _VIEWS.items():
        if own := [result for result in results if result.task == name]:
            found.append({"name": name, "title": tasks.get(name).title, "view": view(own)})
    return found


def _stats(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Returns the few figures at the top of the report."""
    stats = []
    for name, label in (
        ("zeroshot", "zero-shot"),
        ("linear_probe", "linear probe"),
        ("retrieval", "text to image, recall@1"),
    ):
        if results := evaluation.of(name):
            counted = figures.averaged(results)
            values = [result.headline.value for result in counted]
            sets = f"mean of {len(values)} sets" if len(values) > 1 else counted[0].title
            stats.append({"label": label, "value": sum(values) / len(values), "note": sets})
    return stats


def _summary(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Returns a row for each classified data set: its scores by kind of classifier."""
    rows: dict[str, dict[str, Any]] = {}
    for name in ("zeroshot", "linear_probe"):
        for result in evaluation.of(name):
            row = rows.setdefault(result.dataset, {"title": result.title, "scores": {}})
            row["metric"] = result.headline.metric
            row["n"] = result.headline.n
            row["chance"] = result.headline.chance
            for score in result.scores if name == "zeroshot" else result.scores[:1]:
                if score.metric == result.headline.metric:
                    row["scores"][score.variant] = score
    return list(rows.values())


# ---- A view for each section


def _zeroshot(results: Sequence[Result]) -> dict[str, Any]:
    sets = [
        {
            "result": result,
            "top5": next((score for score in result.logged_scores if score.metric == "top5"), None),
            "confusion": confusion.view(confusion.from_json(result.details["classes"]))
            if "classes" in result.details
            else None,
        }
        for result in results
    ]
    averaged = len(figures.averaged(results))
    return {"sets": sets, "prompting": figures.prompting(results), "averaged": averaged}


def _retrieval(results: Sequence[Result]) -> dict[str, Any]:
    return {
        "sets": [
            {
                "result": result,
                "rows": _by_metric(result.scores),
                "gallery": [
                    row | {"images": [Thumbnail(**image) for image in row["images"]]}
                    for row in result.details["gallery"]
                ],
            }
            for result in results
        ]
    }


def _by_metric(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Returns a row for each metric, with its score in each variant."""
    rows: dict[str, dict[str, Any]] = {}
    for score in scores:
        row = rows.setdefault(score.metric, {"metric": score.metric, "scores": {}})
        row["scores"][score.variant] = score
    return list(rows.values())


def _near_duplicates(results: Sequence[Result]) -> dict[str, Any]:
    return {"results": results}


def _linear_probe(results: Sequence[Result]) -> dict[str, Any]:
    return {"results": results, "panels": [figures.strengths(result) for result in results]}


def _few_shot(results: Sequence[Result]) -> dict[str, Any]:
    panels = [figures.few_shot(result) for result in results]
    if len(results) > 1:
        panels.insert(0, figures.few_shot_mean(results))
    return {"results": results, "panels": panels}


def _robustness(results: Sequence[Result]) -> dict[str, Any]:
    panels = [panel for result in results for panel in figures.robustness(result)]
    return {"results": results, "panels": panels}


def _overlap(results: Sequence[Result]) -> dict[str, Any]:
    rows = [{"result": result, "row": overlap_row(result)} for result in results]
    significant = overlap.significant({each["result"].dataset: each["row"] for each in rows})
    return {"rows": rows, "significant": significant, "panels": figures.overlaps(rows)}


def overlap_row(result: Result) -> overlap.Overlap:
    """Restores the row of a data set from JSON."""
    fields = _numbers(result.details["row"])
    parts: dict[str, Any] = {
        name: Proportion(**_numbers(fields[name])) for name in ("all", "overlap", "clean")
    }
    return overlap.Overlap(**fields | parts)


def _numbers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Puts NaN where JSON has null."""
    return {name: math.nan if value is None else value for name, value in fields.items()}


def _bias(results: Sequence[Result]) -> dict[str, Any]:
    return {"results": results}


_VIEWS: dict[str, Callable[[Sequence[Result]], dict[str, Any]]] = {
    "zeroshot": _zeroshot,
    "retrieval": _retrieval,
    "near_duplicates": _near_duplicates,
    "linear_probe": _linear_probe,
    "few_shot": _few_shot,
    "robustness": _robustness,
    "overlap": _overlap,
    "bias": _bias,
}


def _write_pairs(directory: epath.Path, result: Result) -> epath.Path:
    path = directory / f"overlap-{result.dataset}.html"
    page.write(
        path,
        TEMPLATES / "overlap.html.jinja",
        title=f"{result.title}: nearest training images",
        result=result,
        row=overlap_row(result),
        pairs=[
            pair
            | {
                "image": Thumbnail(**pair["image"]),
                "training_image": Thumbnail(**pair["training_image"]),
            }
            for pair in result.details["pairs"]
        ],
    )
    return path
