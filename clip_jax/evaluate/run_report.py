"""report.html: what a run was and what it reached, in one file that needs no network to read."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from clip_jax.common.formatting import percent, short
from clip_jax.common.pages import curves, page
from clip_jax.common.pages.svg import Line, Panel
from clip_jax.evaluate.measures import intervals
from clip_jax.evaluate.run_results import RetrievalResult, RunSummary, ZeroshotResult

HEAT_MAP_CLASSES = 40  # with more, the most confused pairs are listed instead
LISTED = 20  # worst classes and most confused pairs shown where there are too many for all
SMALL_PLOTS = 24  # a run may log hundreds of metrics; the page shows the first so many
_CONFIDENCE = 0.95  # of the interval beside the accuracy


def write_report(
    path: str | os.PathLike[str],
    summary: RunSummary,
    history: Sequence[Mapping[str, float]],
    zeroshot: ZeroshotResult | None,
    retrieval: RetrievalResult | None,
) -> None:
    """Writes the report of a run.

    Args:
      path: the file to write; local, gs:// or s3://.
      summary: what ran.
      history: rows of metrics.jsonl: "step", and metrics named "group/name"; not every row needs
        every metric.
      zeroshot: the last zero-shot evaluation; None: there was none.
      retrieval: the last retrieval evaluation; None: there was none.
    """
    main_plots, small_plots = _panels(history, _chance(zeroshot, retrieval))
    page.write(
        path,
        Path(__file__).with_name("run_report.html.jinja"),
        title=summary.title,
        run=summary,
        main_plots=main_plots,
        small_plots=small_plots[:SMALL_PLOTS],
        plots_left_out=len(small_plots[SMALL_PLOTS:]),
        zeroshot=zeroshot and zeroshot_view(zeroshot),
        retrieval=retrieval and retrieval_view(retrieval),
    )


# --- learning curves


def _panel(title: str, series: Sequence[curves.Series], share: bool = False) -> Panel:
    show = percent if share else short
    leaves = [one.label.rpartition("/")[2] for one in series]
    unique = len(set(leaves)) == len(leaves)
    legend = [
        Line(
            name=_title(leaf if unique else one.label),
            last=show(one.last),
            chance="" if one.chance is None else show(one.chance),
        )
        for leaf, one in zip(leaves, series)
    ]
    text = "; ".join(
        f"{one.label} from {show(one.first)} to {show(one.last)} at step {one.steps[-1]}"
        for one in series
    )
    return Panel(title, curves.draw(series, f"{title}: {text}", percent=share), legend)


def _panels(
    history: Iterable[Mapping[str, float]], chance: Mapping[str, float]
) -> tuple[list[Panel], list[Panel]]:
    """Losses, and accuracies by group, in one plot each; then every other metric in its own."""
    series = curves.collect(history, chance)
    main: dict[str, list[curves.Series]] = {}
    small = []
    for name, one in series.items():
        group, _, leaf = name.rpartition("/")
        if leaf == "loss":
            main.setdefault("loss", []).append(one)
        elif leaf.startswith(("top", "recall@")) or group == "suite":
            main.setdefault(group, []).append(one)
        elif leaf != "images_seen":  # a straight line
            small.append(_panel(_title(name.removeprefix("train/")), [one]))
    large = [_panel(_title(title), some, title != "loss") for title, some in main.items()]
    return sorted(large, key=lambda panel: panel.title != "loss"), small


def _title(name: str) -> str:
    return name.replace("/", ": ").replace("_", " ").replace("zeroshot", "zero-shot accuracy")


def _chance(zeroshot: ZeroshotResult | None, retrieval: RetrievalResult | None) -> dict[str, float]:
    """What guessing reaches, by the name that the history gives the metric."""
    levels = {}
    if retrieval:
        levels |= {f"retrieval/{name}": value for name, value in retrieval.chance.items()}
    if zeroshot:
        classes = len(zeroshot.class_names)
        levels |= {f"zeroshot/top{k}": min(k, classes) / classes for k in (1, 5)}
    return levels


# --- tables


def zeroshot_view(result: ZeroshotResult) -> dict:
    """Everything the page shows of zero-shot classification, in the order it shows it."""
    names, confusion = result.class_names, np.asarray(result.confusion)
    wrong = confusion - np.diag(np.diag(confusion))
    totals = confusion.sum(axis=1)
    rows = [
        {
            "name": name,
            "n": int(totals[i]),
            "right": int(confusion[i, i]),
            "share": float(result.per_class[i]),
            "taken_for": names[wrong[i].argmax()],
            "times": int(wrong[i].max()),
        }
        for i, name in enumerate(names)
    ]
    few = len(names) <= HEAT_MAP_CLASSES
    tested = [row for row in rows if row["n"]]
    return {
        "result": result,
        "chance": 1 / len(names),
        "interval": intervals.wilson(round(result.top1 * result.n), result.n, _CONFIDENCE),
        "rows": rows,
        "worst": [] if few else sorted(tested, key=lambda row: row["share"])[:LISTED],
        "heat_map": _heat_map(confusion) if few else None,
        "pairs": [] if few else _confused_pairs(names, wrong, totals),
    }


def _heat_map(confusion: np.ndarray) -> list[list[dict]]:
    """Cells by row: the count, and its depth of colour in [0, 1] from its share of the row."""
    # The root lifts the few errors of a good model out of the ground colour.
    depth = np.sqrt(confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1))
    return [
        [
            {"count": int(count), "depth": f"{shade:.2f}", "strong": shade > 0.6}
            for count, shade in zip(*row)
        ]
        for row in zip(confusion, depth)
    ]


def _confused_pairs(names: Sequence[str], wrong: np.ndarray, totals: np.ndarray) -> list[dict]:
    """The pairs of classes confused most often, most frequent first."""
    order = np.argsort(-wrong, axis=None, kind="stable")[:LISTED]
    pairs = zip(*(axis.tolist() for axis in np.unravel_index(order, wrong.shape)))
    return [
        {
            "true": names[i],
            "predicted": names[j],
            "count": int(wrong[i, j]),
            "share": float(wrong[i, j] / totals[i]),
        }
        for i, j in pairs
        if wrong[i, j]
    ]


def retrieval_view(result: RetrievalResult) -> dict:
    rows = []
    for name, value in result.metrics.items():
        group, _, leaf = name.rpartition("/")
        share, chance = leaf.startswith("recall@"), result.chance.get(name)
        rows.append(
            {
                "group": _title(group),
                "name": leaf.replace("_", " "),
                "value": percent(value) if share else short(value),
                "chance": chance,
                "times": value / chance if chance else None,
                "headline": leaf == "recall@1",
            }
        )
    return {"result": result, "rows": rows}
