"""report.html: what a run was and what it reached, in one file that needs no network to read."""

import base64
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from etils import epath
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from clip_jax.evals import plots
from clip_jax.evals.results import RetrievalResult, RunSummary, ZeroshotResult

HEAT_MAP_CLASSES = 40  # with more, the most confused pairs are listed instead
LISTED = 20  # worst classes and most confused pairs shown where there are too many for all
SMALL_PLOTS = 24  # a run may log hundreds of metrics; the page shows the first so many
_CRISP = 64  # pixels: images up to this size are kept exactly and enlarged without smoothing
_LARGEST = 160  # pixels: larger images are reduced to it, for the size of the file


def write_report(
    path: str | os.PathLike[str],
    summary: RunSummary,
    history: Sequence[Mapping[str, float]],
    zeroshot: ZeroshotResult | None,
    retrieval: RetrievalResult | None,
) -> None:
    """Writes the report of a run.

    Args:
      path: the file to write, local or remote (gs://).
      summary: what ran.
      history: rows of metrics.jsonl: "step", and metrics named "group/name"; not every row needs
        every metric.
      zeroshot: the last zero-shot evaluation; None: there was none.
      retrieval: the last retrieval evaluation; None: there was none.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": percent,
        "duration": duration,
        "short": plots.short,
        "image": _image,
        "number": lambda value: f"{value:,}",
    }
    template = Path(__file__).with_name("report.html.jinja").read_text("utf-8")
    main_plots, small_plots = _panels(history, _chance(zeroshot, retrieval))
    page = environment.from_string(template).render(
        run=summary,
        main_plots=main_plots,
        small_plots=small_plots[:SMALL_PLOTS],
        plots_left_out=len(small_plots[SMALL_PLOTS:]),
        zeroshot=zeroshot and _zeroshot_view(zeroshot),
        retrieval=retrieval and _retrieval_view(retrieval),
        dashes=plots.DASHES,
    )
    # Captions come from the web: a lone surrogate must not lose the report.
    epath.Path(path).write_bytes(page.encode("utf-8", "replace"))


def percent(share: float) -> str:
    """A fraction in per cent: "95.8 %"; more digits where it is tiny; a dash for NaN."""
    if math.isnan(share):
        return "–"
    points = 100 * share
    text = f"{points:.1f}" if points == 0 or points >= 1 else f"{points:.2g}"
    return f"{text}\N{NO-BREAK SPACE}%"


def duration(seconds: float) -> str:
    """Two units of time at most: "42 s", "3 min 42 s", "2 d 4 h"."""
    left, parts = round(seconds), []
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count}\N{NO-BREAK SPACE}{unit}")
    return " ".join(parts[:2])


def interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a share seen in n independent trials."""
    if n == 0:
        return 0.0, 1.0
    z2 = 1.959964**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return centre - half, centre + half


def _image(pixels: np.ndarray) -> Markup:
    """The attributes src, width and height (and class) of <img> for uint8 [h, w, 3]."""
    image, buffer = Image.fromarray(np.asarray(pixels, np.uint8)), io.BytesIO()
    crisp = max(image.size) <= _CRISP
    if crisp:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.thumbnail((_LARGEST, _LARGEST))
        image.save(buffer, "JPEG", quality=80, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Markup(
        f'src="data:image/{"png" if crisp else "jpeg"};base64,{data}" '
        f'width="{image.width}" height="{image.height}"{" class=crisp" if crisp else ""}'
    )


# --- learning curves


@dataclass(frozen=True)
class Panel:
    """One plot and what the page says around it."""

    title: str
    svg: Markup
    legend: Sequence[Mapping[str, str]]  # name, last value and chance level ("": none) of each line


def _panel(title: str, series: Sequence[plots.Series], share: bool = False) -> Panel:
    show = percent if share else plots.short
    leaves = [one.label.rpartition("/")[2] for one in series]
    unique = len(set(leaves)) == len(leaves)
    legend = [
        {
            "name": _title(leaf if unique else one.label),
            "last": show(one.last),
            "chance": "" if one.chance is None else show(one.chance),
        }
        for leaf, one in zip(leaves, series)
    ]
    text = "; ".join(
        f"{one.label} from {show(one.first)} to {show(one.last)} at step {one.steps[-1]}"
        for one in series
    )
    return Panel(title, plots.draw(series, f"{title}: {text}", share=share), legend)


def _panels(
    history: Iterable[Mapping[str, float]], chance: Mapping[str, float]
) -> tuple[list[Panel], list[Panel]]:
    """Losses, and accuracies by group, in one plot each; then every other metric in its own."""
    series = plots.collect(history, chance)
    main: dict[str, list[plots.Series]] = {}
    small = []
    for name, one in series.items():
        group, _, leaf = name.rpartition("/")
        if leaf == "loss":
            main.setdefault("loss", []).append(one)
        elif leaf.startswith(("top", "recall@")):
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


def _zeroshot_view(result: ZeroshotResult) -> dict:
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
        "interval": interval(result.top1, result.n),
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


def _retrieval_view(result: RetrievalResult) -> dict:
    rows = []
    for name, value in result.metrics.items():
        group, _, leaf = name.rpartition("/")
        share, chance = leaf.startswith("recall@"), result.chance.get(name)
        rows.append(
            {
                "group": _title(group),
                "name": leaf.replace("_", " "),
                "value": percent(value) if share else plots.short(value),
                "chance": chance,
                "times": value / chance if chance else None,
                "headline": leaf == "recall@1",
            }
        )
    return {"result": result, "rows": rows}
