"""The tasks that models are evaluated on, one file each, imported on demand."""

import functools
import importlib
import time
from collections.abc import Sequence

from clip_jax.errors import UserError
from clip_jax.evaluate.results import Result
from clip_jax.evaluate.sets.dataset import Dataset
from clip_jax.evaluate.tasks.context import Context, Settings, Task

__all__ = ["NAMES", "Context", "Settings", "Task", "get", "parse_names", "run", "skipped_tasks"]

NAMES = (
    "zeroshot",
    "retrieval",
    "near_duplicates",
    "linear_probe",
    "few_shot",
    "robustness",
    "overlap",
    "bias",
)


@functools.cache
def get(name: str) -> Task:
    """Imports a task, along with the solvers and statistics that it needs."""
    return importlib.import_module(f"{__name__}.{name}").TASK


def parse_names(listed: str, setting: str) -> list[str]:
    """Parses a comma-separated list of tasks.

    Args:
      listed: the list.
      setting: name of the setting or flag, for the message.

    Raises:
      UserError: there is no such task.
    """
    names = [name.strip() for name in listed.split(",") if name.strip()]
    if unknown := [name for name in names if name not in NAMES]:
        raise UserError(
            f"There is no task {unknown[0]!r}: {setting} takes {', '.join(NAMES)}, comma-separated."
        )
    return names


def skipped_tasks(context: Context, names: Sequence[str]) -> dict[str, str]:
    """Returns the tasks that the model or all data sets do not support, and a sentence on each."""
    return {
        name: f"Task {name} is skipped: it takes {get(name).requires}."
        for name in names
        if not any(get(name).supports(context, dataset) for dataset in context.datasets)
    }


def run(context: Context, name: str, dataset: Dataset, made_of: str = "") -> Result:
    """Runs a task on a data set.

    Args:
      context: the model and the settings.
      name: name of the task.
      dataset: data set that it supports.
      made_of: checksum of everything the result depends on, stored with it.
    """
    began = time.monotonic()
    scores, details = get(name).run(context, dataset)
    return Result(
        task=name,
        dataset=dataset.name,
        title=dataset.title,
        base=dataset.base,
        made_of=made_of,
        scores=tuple(scores),
        details=details,
        seconds=time.monotonic() - began,
    )
