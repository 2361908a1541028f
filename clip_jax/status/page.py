"""The state of runs as a page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from clip_jax.common import starts
from clip_jax.common.pages import page
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
    rows = [row for name, run in zip(names, found) for row in _losses(name, run)]
    page.write(
        path,
        Path(__file__).with_name("status.html.jinja"),
        title=found[0].name if len(found) == 1 else f"{len(found)} runs",
        now=found[0].now,
        runs=[_values(run, name) for run, name in zip(found, names)],
        columns=text.COLUMNS,
        compared=report.panels(rows, {})[0] if len(found) > 1 else [],
        kinds=starts.KINDS,
    )


def _losses(name: str, run: Run) -> list[dict[str, float]]:
    """Returns the losses of a run under its own name, for one plot of all."""
    values = text.series(run, "train/loss")
    return [{"step": step, f"{name}/loss": value} for step, value in values.items()]


def _values(run: Run, name: str) -> dict[str, Any]:
    main_plots, small_plots = report.panels(run.rows, {})
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
