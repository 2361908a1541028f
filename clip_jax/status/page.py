"""The state of runs as a page."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from clip_jax.common import goodput
from clip_jax.common.pages import curves, page
from clip_jax.common.pages.svg import Line, Panel
from clip_jax.status import run as runs
from clip_jax.status import text
from clip_jax.status.run import LIVE, Run
from clip_jax.training import report


def write(path: epath.PathLike, found: Sequence[Run]) -> None:
    """Writes a page on one run, or on several side by side.

    Args:
      path: file to write; local, gs:// or s3://.
      found: at least one run.
    """
    names = text.short_names([run.name for run in found])
    page.write(
        path,
        Path(__file__).with_name("status.html.jinja"),
        title=found[0].name if len(found) == 1 else f"{len(found)} runs",
        now=found[0].now,
        runs=[_values(run, name, len(found) == 1) for run, name in zip(found, names)],
        columns=text.COLUMNS,
        compared=_compared(names, found) if len(found) > 1 else [],
        kinds=goodput.KINDS,
    )


def _compared(names: Sequence[str], found: Sequence[Run]) -> list[Panel]:
    """Draws the loss and the scores of all runs, each over one pair of axes."""
    panels = []
    for metric in dict.fromkeys(["train/loss", *filter(None, map(text.score_name, found))]):
        points = [text.series(run, metric) for run in found]
        rows = [
            {"step": step, f"{name}/{metric}": value}
            for name, values in zip(names, points)
            for step, value in values.items()
        ]
        if series := curves.collect(rows, {}):
            title = "loss" if metric == "train/loss" else metric
            panel = report.panel(title, list(series.values()), text.is_score(metric))
            legend = [
                Line(name.removesuffix(f"/{metric}"), line.last)
                for name, line in zip(series, panel.legend)
            ]
            panels.append(dataclasses.replace(panel, legend=legend))
    return panels


def _values(run: Run, name: str, alone: bool) -> dict[str, Any]:
    main_plots, small_plots = report.panels(run.rows if alone else [], {})
    return {
        "name": name,
        "state": runs.state(run).value,
        "sentence": runs.sentence(run),
        "advice": runs.advice(run),
        "cells": text.cells(run),
        "step": run.step,
        "total": run.total,
        "remarks": run.remarks,
        "starts": run.starts,
        "account": run.account,
        "live": runs.state(run) in LIVE,
        "main_plots": main_plots,
        "small_plots": small_plots[: report.SMALL_PLOTS],
        "checkpoints": run.checkpoints,
        "facts": run.last.facts if run.last else {},
    }
