"""All tasks on all data sets: what is there already is kept, what is missing is named."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from clip_jax.common.formatting import format_seconds, percent
from clip_jax.errors import StorageError, UserError
from clip_jax.evaluate.embedding_source import TEST
from clip_jax.evaluate.folder import Folder
from clip_jax.evaluate.results import Result, Score, fingerprint
from clip_jax.evaluate.sets import finding
from clip_jax.evaluate.sets.dataset import Dataset
from clip_jax.evaluate.tasks import TASKS, Context, Task

Say = Callable[[str], None]


def complete(context: Context, say: Say) -> tuple[Context, dict[str, str]]:
    """The context with the data sets whose test split is there, and why the others are not."""
    found, missing = [], {}
    for dataset in context.datasets:
        try:
            source = context.material.source(dataset, TEST)
            found.append(finding.with_classes_of(dataset, source))
        except StorageError:
            raise
        except UserError as error:
            missing[dataset.name] = str(error)
            say(f"{dataset.title}: {error}")
    return dataclasses.replace(context, datasets=found), missing


def idle(context: Context, names: Sequence[str], say: Say) -> dict[str, str]:
    """The tasks that none of the data sets, or not this model, can be put to, and why."""
    found = {}
    for name in names:
        if not any(TASKS[name].applies(context, dataset) for dataset in context.datasets):
            found[name] = f"Task {name} is not done here: it takes {TASKS[name].takes}."
            say(found[name])
    return found


def prepare(context: Context, names: Sequence[str]) -> None:
    """Embeds everything that the tasks need, together with the other hosts."""
    for dataset in context.datasets:
        tasks = [TASKS[name] for name in names if TASKS[name].applies(context, dataset)]
        for role in dict.fromkeys(role for task in tasks for role in task.roles):
            try:
                context.material.split(dataset, role)
            except StorageError:
                raise
            except UserError:
                continue  # whoever needs it says so


def run_all(
    context: Context, names: Sequence[str], folder: Folder, parameters: str, say: Say
) -> tuple[list[Result], dict[str, str]]:
    """Every task on every data set that it applies to.

    Args:
      context: with the data sets that are there.
      names: of tasks.
      folder: of results; those that are there and made of the same are not made again.
      parameters: a checksum of the model.
      say: tells the user a line.

    Returns:
      What was found, and by "DATASET, TASK" why something could not be.
    """
    results, failed = [], {}
    width = max(len(dataset.title) for dataset in context.datasets)
    for dataset in context.datasets:
        for name in names:
            task = TASKS[name]
            if not task.applies(context, dataset):
                continue
            made_of = fingerprint(_depends(context, name, dataset, parameters))
            result = folder.read(name, dataset.name, made_of)
            try:
                if result is None:
                    result = _run(context, name, task, dataset, made_of)
                    folder.write(result)
                    say(_line(result, width, format_seconds(result.seconds)))
                else:
                    say(_line(result, width, "done before"))
                results.append(result)
            except StorageError:  # nothing else is there to be read either, nor to be written to
                raise
            except UserError as error:
                failed[f"{dataset.name}, {name}"] = str(error)
                say(f"{dataset.title}, {task.title.lower()}: {error}")
        context.material.release(dataset)
    return results, failed


def _run(context: Context, name: str, task: Task, dataset: Dataset, made_of: str) -> Result:
    began = time.monotonic()
    scores, details = task.run(context, dataset)
    seconds = time.monotonic() - began
    return Result(
        task=name,
        dataset=dataset.name,
        title=dataset.title,
        base=dataset.base,
        made_of=made_of,
        scores=tuple(scores),
        details=details,
        seconds=seconds,
    )


def _depends(context: Context, name: str, dataset: Dataset, parameters: str) -> dict[str, Any]:
    """All that a result is made of."""
    return {
        "task": name,
        "dataset": dataclasses.asdict(dataset),
        "others": [each.name for each in context.datasets if each.base == dataset.name],
        "parameters": parameters,
        "settings": dataclasses.asdict(context.settings),
        "training": _training(context) if name == "overlap" else (),
    }


def _training(context: Context) -> tuple[str, ...]:
    return (context.training.name, context.training.parameters) if context.training else ()


def _line(result: Result, width: int, when: str) -> str:
    task = TASKS[result.task].title.lower()
    return f"{result.title:<{width}}  {task:<30}  {show(result.headline)}  ({when})"


def show(score: Score) -> str:
    """ "accuracy 98.6 % (97.5 % to 99.3 %)"."""
    within = ""
    if score.low is not None and score.high is not None:
        within = f" ({percent(score.low)} to {percent(score.high)})"
    name = score.metric.replace("_", " ").replace("/", ", ")
    return f"{name} {percent(score.value)}{within}".replace("\N{NO-BREAK SPACE}", " ")
