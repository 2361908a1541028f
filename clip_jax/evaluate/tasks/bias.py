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
from clip_jax.evaluate.results import Found, Score
from clip_jax.evaluate.sets.dataset import Dataset
from clip_jax.evaluate.tasks import zeroshot
from clip_jax.evaluate.tasks.context import Context, Task, recognizes

_LISTED = 10  # labels that differ most between groups


def run(context: Context, dataset: Dataset) -> Found:
    """Misclassification by group, with and without added classes; labels by group."""
    material, settings = context.material, context.settings
    split, targets = labelled(material, dataset, TEST)
    groups = _groups(dataset, split.groups)
    prompts = dataset.prompt_set(settings.prompts)
    own = [name.split("|")[0] for name in prompts.class_names]
    tables, scores = [], []
    for added in _steps(dataset):
        offered = (*prompts.class_names, *itertools.chain.from_iterable(added.values()))
        some = prompts._replace(class_names=offered)
        cosines = zeroshot.similarities(material, dataset, split, some)
        odds = special.softmax(material.scale * cosines.astype(np.float64), axis=1)
        wrong = {"misclassified": odds.argmax(axis=1) != targets}
        for key, members in groups.items():
            table = bias.proportions(wrong, members, settings.confidence)
            if added:
                spoken = [name.split("|")[0] for name in offered]
                landed = bias.categories(odds, spoken, added, members, settings.confidence)
                table = _beside(table, landed)
            tables.append(_table(f"By {key}", added, table))
            scores += _scores(dataset, key, added, table)
    differences = []
    cosines = zeroshot.similarities(material, dataset, split, prompts)
    odds = special.softmax(material.scale * cosines.astype(np.float64), axis=1)
    for (key, members), threshold in itertools.product(groups.items(), settings.label_thresholds):
        found = bias.label_differences(odds, own, members, threshold, settings.confidence)
        differences.append(
            {
                "key": key,
                "threshold": threshold,
                "rows": [dataclasses.asdict(row) for row in found[:_LISTED]],
            }
        )
    return Found(scores, {"tables": tables, "differences": differences})


def _groups(dataset: Dataset, values: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """The group of each image, by key; and by all keys at once."""
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
    """Categories of added classes: none, those that the data set adds, and further ones besides."""
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
        {"group": group, "shares": [dataclasses.asdict(share) for share in shares]}
        for group, shares in table.rows.items()
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
            share.value,
            share.low,
            share.high,
            share.trials,
        )
        for group, shares in table.rows.items()
        for column, share in zip(table.columns, shares)
    ]


TASK = Task(
    title="Bias probes",
    roles=(TEST,),
    takes="images with groups, classes with prompts, and a model that knows texts",
    applies=lambda context, dataset: bool(dataset.group_keys) and recognizes(context, dataset),
    run=run,
)
