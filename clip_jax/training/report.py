"""report.html of a run: its settings, curves and results, in one file that needs no network."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from clip_jax.common import formatting, goodput
from clip_jax.common.pages import curves, page, svg
from clip_jax.common.pages.svg import Line, Panel
from clip_jax.common.starts import Start
from clip_jax.evaluate import report
from clip_jax.evaluate.results import Result, Score

_DIRECTIONS = ("text_to_image", "image_to_text")
# A straight line, and images_per_second over a constant. So are all of "time", which the table of
# the starts explains better, and counters that stay at zero.
_REDUNDANT = ("images_seen", "images_per_second_per_chip")
_FRACTIONS = ("/mfu", "/waiting")
SMALL_PLOTS = 24  # a run may log hundreds of metrics; the page shows the first so many


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """The facts about a run that stand in its report.

    Attributes:
      title: name of the model and the data.
      command: command line of the run.
      started, finished: date and time of the last start and of the end.
      wall_seconds: time of the run, all starts together.
      hardware: number and kind of the devices.
      params: number of parameters.
      images_seen: pairs trained on, repeated ones counted again.
      steps: number of steps.
      images_per_second: median speed of training.
      skipped: number of unusable examples, by reason.
      truncated: number of captions cut to the context length.
      config_text: the resolved config.
      notes: a sentence about each thing that was not evaluated, or not on data of one's own.
    """

    title: str
    command: str
    started: datetime
    finished: datetime
    wall_seconds: float
    hardware: str
    params: int
    images_seen: int
    steps: int
    images_per_second: float
    skipped: Mapping[str, int]
    truncated: int
    config_text: str
    notes: Sequence[str] = ()


def write_report(
    path: str | os.PathLike[str],
    summary: RunSummary,
    history: Sequence[Mapping[str, float]],
    results: Sequence[Result] = (),
    scores: Mapping[str, Score] | None = None,
    headlines: Mapping[str, Score] | None = None,
    past: Sequence[Start] = (),
) -> None:
    """Writes the report of a run.

    Args:
      path: file to write; local, gs:// or s3://.
      summary: facts about the run.
      history: rows of metrics.jsonl: "step", and metrics named "group/name"; not every row needs
        every metric.
      results: results of the last evaluation.
      scores: scores of it by the names of the history, for the lines of chance.
      headlines: those of them that stand on top.
      past: starts of the run, in order.
    """
    chance = {n: s.chance for n, s in (scores or {}).items() if s.chance is not None}
    main_plots, small_plots = panels(history, chance)
    page.write(
        path,
        Path(__file__).with_name("report.html.jinja"),
        report.TEMPLATES,
        title=summary.title,
        run=summary,
        main_plots=main_plots,
        small_plots=small_plots[:SMALL_PLOTS],
        plots_left_out=len(small_plots[SMALL_PLOTS:]),
        sections=report.sections(results),
        past=past,
        account=goodput.account(past),
        kinds=goodput.KINDS,
        stats=[
            {"label": _stat_title(name), "value": score.value, "chance": score.chance}
            for name, score in (headlines or {}).items()
        ],
    )


# ---- Learning curves


def panel(title: str, series: Sequence[curves.Series], fraction: bool = False) -> Panel:
    """Draws series over one pair of axes; `fraction`: they are shown in percent."""
    show = formatting.percent if fraction else svg.short
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
    return Panel(title, curves.draw(series, f"{title}: {text}", percent=fraction), legend)


def panels(
    history: Iterable[Mapping[str, float]], chance: Mapping[str, float]
) -> tuple[list[Panel], list[Panel]]:
    """Draws losses and the main scores by group; then all other metrics, families in one plot."""
    series = curves.collect(history, chance)
    main: dict[str, list[curves.Series]] = {}
    small: dict[str, list[curves.Series]] = {}
    for name, one in series.items():
        group, _, leaf = name.rpartition("/")
        # There may be dozens of data sets by name ("zeroshot/imagenet/top1").
        described = group.count("/") == 0 or (group.endswith(_DIRECTIONS) and group.count("/") == 1)
        if leaf == "loss":
            main.setdefault("loss", []).append(one)
        elif leaf == "mean":
            main.setdefault("mean over data sets", []).append(one)
        elif leaf.startswith(("top", "recall@")) and described:
            main.setdefault(group, []).append(one)
        elif leaf not in _REDUNDANT and group != "time" and one.values.any():
            small.setdefault(_family(name), []).append(one)
    large = [panel(_title(title), some, title != "loss") for title, some in main.items()]
    drawn = [
        panel(_title(title.removeprefix("train/")), some, title.endswith(_FRACTIONS))
        for title, some in small.items()
    ]
    return sorted(large, key=lambda one: one.title != "loss"), drawn


def _family(name: str) -> str:
    """Returns the plot of a metric: that of the whole for "train/grad_norm/image", else its own."""
    group, _, rest = name.partition("/")
    if group == "device":
        return group
    return f"{group}/{rest.partition('/')[0]}" if group in ("train", "data") else name


def _title(name: str) -> str:
    title = name.replace("/", ": ").replace("_", " ").replace("zeroshot", "zero-shot accuracy")
    return "MFU" if title == "mfu" else title.replace(" gib", " (GiB)")


def _stat_title(name: str) -> str:
    """ "zeroshot/top1" as "zero-shot top-1"."""
    title = name.replace("zeroshot", "zero-shot").replace("top1", "top-1").replace("_", " ")
    task, _, metric = title.partition("/")
    return f"{task} {metric}" if task == "zero-shot" else f"{task}: {metric.replace('/', ', ')}"
