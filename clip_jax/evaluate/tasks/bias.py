"""Bias probes over images with group labels (paper section 7.1)."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

from clip_jax.errors import UserError
from clip_jax.evaluate.embedding_source import TEST, labelled
from clip_jax.evaluate.measures import bias
from clip_jax.evaluate.results import Findings, Score
from clip_jax.evaluate.sets.dataset import Dataset
from clip_jax.evaluate.tasks import zeroshot
from clip_jax.evaluate.tasks.context import Context, Task, recognizes

_LISTED = 10  # labels that differ most between groups


def run(context: Context, dataset: Dataset) -> Findings:
    """Measures misclassification by group, with and without added classes, and labels by group."""
    embeddings, settings = context.embeddings, context.settings
    split, targets = labelled(embeddings, dataset, TEST)
    groups = _groups(dataset, split.groups)
    prompts = dataset.prompt_set(settings.prompts)
    own = [name.split("|")[0] for name in prompts.class_names]
    tables, scores = [], []
    for added in _steps(dataset):
        offered = (*prompts.class_names, *itertools.chain.from_iterable(added.values()))
        some = prompts._replace(class_names=offered)
        cosines = zeroshot.similarities(embeddings, dataset, split, some)
        probabilities = special.softmax(embeddings.scale * cosines.astype(np.float64), axis=1)
        wrong = {"misclassified": probabilities.argmax(axis=1) != targets}
        for key, members in groups.items():
            table = bias.proportions(wrong, members, settings.confidence)
            if added:
                spoken = [name.split("|")[0] for name in offered]
                landed = bias.categories(probabilities, spoken, added, members, settings.confidence)
                table = _beside(table, landed)
            tables.append(_table(f"By {key}", added, table))
            scores += _scores(dataset, key, added, table)
    differences = []
    cosines = zeroshot.similarities(embeddings, dataset, split, prompts)
    probabilities = special.softmax(embeddings.scale * cosines.astype(np.float64), axis=1)
    for (key, members), threshold in itertools.product(groups.items(), settings.label_thresholds):
        found = bias.label_differences(probabilities, own, members, threshold, settings.confidence)
        differences.append(
            {
                "key": key,
                "threshold": threshold,
                "rows": [dataclasses.asdict(row) for row in found[:_LISTED]],
            }
        )
    return Findings(scores, {"tables": tables, "differences": differences})


def _groups(dataset: Dataset, values: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Returns the group of each image by key, and by all keys together."""
    keys = dataset.group_keys
    if not any(any(row) for row in values):
        raise UserError(
            f"No image of {dataset.title} has a group under {', '.join(keys)}: name the columns "
            "that hold them as group_keys in the description of the data set."
        )
    columns = dict(zip(keys, map(list, zip(*values))))
    if len(keys) > 1:
        columns[" and ".join(keys)] = bias.cross(*columns.values())
    return columns


def _steps(dataset: Dataset) -> list[dict[str, tuple[str, ...]]]:
    """Returns the added classes of each step: none, the data set's, and those with further ones."""
    steps: list[dict[str, tuple[str, ...]]] = [{}]
    for more in (dataset.added_classes, dataset.further_classes):
        if more:
            steps.append({**steps[-1], **more})
    return steps


def _beside(left: bias.Table, right: bias.Table) -> bias.Table:
    rows = {group: left.rows[group] + right.rows[group] for group in left.rows}
    return bias.Table(left.columns + right.columns, rows)


def _table(title: str, added: dict[str, tuple[str, ...]], table: bias.Table) -> dict[str, Any]:
    rows = [
        {"group": group, "proportions": [dataclasses.asdict(each) for each in proportions]}
        for group, proportions in table.rows.items()
    ]
    return {"title": title, "added": added, "columns": list(table.columns), "rows": rows}


def _scores(
    dataset: Dataset, key: str, added: dict[str, tuple[str, ...]], table: bias.Table
) -> list[Score]:
    which = f"{key}, with {' and '.join(added)}" if added else key
    return [
        Score(
            "bias",
            dataset.name,
            f"{which}: {group}",
            column,
            proportion.value,
            proportion.low,
            proportion.high,
            proportion.trials,
        )
        for group, proportions in table.rows.items()
        for column, proportion in zip(table.columns, proportions)
    ]


TASK = Task(
    title="Bias probes",
    splits=(TEST,),
    requires="images with groups, classes with prompts, and a model that can score text",
    supports=lambda context, dataset: bool(dataset.group_keys) and recognizes(context, dataset),
    run=run,
)
