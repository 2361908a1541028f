"""Overlap of test sets with the training data, and its effect on accuracy (paper section 5)."""

import dataclasses
from typing import Any

import numpy as np

from clip_jax.common.pages.pictures import thumbnail
from clip_jax.evaluate.embedding_source import TEST, EmbeddedSplit, Nearest, TrainingData, labelled
from clip_jax.evaluate.measures import metrics, overlap
from clip_jax.evaluate.results import Findings, Score
from clip_jax.evaluate.sets.dataset import Dataset
from clip_jax.evaluate.tasks import zeroshot
from clip_jax.evaluate.tasks.context import Context, Task, recognizes

_PAIRS = 60  # pairs on the page of a data set, for choosing the threshold
_STEPS = 200  # thresholds in the table of that page


def run(context: Context, dataset: Dataset) -> Findings:
    """Splits the test set by similarity to the training data; measures accuracy on each part."""
    training, settings = context.training, context.settings
    assert training is not None
    split, targets = labelled(context.embeddings, dataset, TEST)
    prompts = dataset.prompt_set(settings.prompts)
    similar = zeroshot.similarities(context.embeddings, dataset, split, prompts)
    correct = metrics.correct(similar, targets)
    nearest = training.nearest(dataset, split)
    threshold = settings.thresholds.get(dataset.name, settings.overlap_threshold)
    row = overlap.analyse(correct, nearest.similarity, threshold, settings.confidence)
    steps = np.quantile(nearest.similarity, np.linspace(0, 1, _STEPS))
    found = overlap.sweep(correct, nearest.similarity, np.unique(steps), settings.confidence)
    details: dict[str, Any] = {
        "training": training.name,
        "row": dataclasses.asdict(row),
        "sweep": [
            [step.threshold, step.overlap.trials, step.overlap.value, step.clean.value]
            for step in found
        ],
        "pairs": _pairs(context, dataset, split, training, nearest),
    }
    return Findings(_scores(dataset, row), details)


def _scores(dataset: Dataset, row: overlap.Overlap) -> list[Score]:
    n = row.all.trials
    gain = "accuracy gained by overlap"
    scores = [Score("overlap", dataset.name, "all minus clean", gain, row.inflation, n=n)]
    scores += [
        Score(
            "overlap",
            dataset.name,
            name,
            "accuracy",
            part.value,
            part.low,
            part.high,
            n=part.trials,
        )
        for name, part in (("all", row.all), ("overlap", row.overlap), ("clean", row.clean))
    ]
    scores.append(Score("overlap", dataset.name, "overlap", "share of images", row.fraction, n=n))
    scores.append(Score("overlap", dataset.name, "overlap", "p-value", row.p_value, n=n))
    return scores


def _pairs(
    context: Context,
    dataset: Dataset,
    split: EmbeddedSplit,
    training: TrainingData,
    nearest: Nearest,
) -> list[dict[str, Any]]:
    """Returns test images beside their nearest training images, most similar first."""
    order = np.argsort(-nearest.similarity, kind="stable")
    most_similar, others = order[: _PAIRS // 2], order[_PAIRS // 2 :]
    # Sampled more and more sparsely, since near-duplicates are few.
    places = np.geomspace(1, max(len(others), 1), min(_PAIRS // 2, len(others))).astype(int) - 1
    pairs = []
    for at in [*most_similar, *others[np.unique(places)]]:
        key, image = training.picture(int(nearest.rows[at]))
        own = context.embeddings.picture(dataset, TEST, int(split.indices[at]))
        pairs.append(
            {
                "similarity": float(nearest.similarity[at]),
                "key": split.table["key"][int(at)].as_py(),
                "image": dataclasses.asdict(thumbnail(own)),
                "training_key": key,
                "training_image": dataclasses.asdict(thumbnail(image)),
            }
        )
    return pairs


TASK = Task(
    title="Overlap with the training data",
    splits=(TEST,),
    requires="--train_data, classes with prompts, and a model that can score text",
    supports=lambda context, dataset: (
        context.training is not None and recognizes(context, dataset) and not dataset.multi_label
    ),
    run=run,
)
