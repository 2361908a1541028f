"""Few-shot probes beside zero-shot (paper figures 6 and 7)."""

import logging
import math

import numpy as np

from clip_jax.evaluate.embedding_source import TEST, TRAIN, VALIDATION, labelled
from clip_jax.evaluate.measures import few_shot, sweep
from clip_jax.evaluate.measures.metrics import METRICS
from clip_jax.evaluate.results import Findings, Score
from clip_jax.evaluate.sets.dataset import Dataset
from clip_jax.evaluate.tasks import linear_probe, zeroshot
from clip_jax.evaluate.tasks.context import Context, Task, recognizes


def run(context: Context, dataset: Dataset) -> Findings:
    """Fits probes to a few examples per class; finds the number that equals zero-shot."""
    settings, metric = context.settings, METRICS[dataset.metric]
    train, validation, test = (
        linear_probe.features(context, dataset, split) for split in (TRAIN, VALIDATION, TEST)
    )
    points = few_shot.curve(
        train,
        validation,
        test,
        metric,
        len(dataset.class_names),
        context.embeddings.mesh,
        settings.shots,
        settings.repeats,
        settings.seed,
    )
    split, targets = labelled(context.embeddings, dataset, TEST)
    prompts = dataset.prompt_set(settings.prompts)
    zero = metric(zeroshot.similarities(context.embeddings, dataset, split, prompts), targets)
    full = linear_probe.probe(context, dataset).score
    shots, means = [p.shots for p in points], [p.mean for p in points]
    per_class = (len(train.targets) + len(validation.targets)) / len(dataset.class_names)
    needed = few_shot.labels_needed(zero, shots, means, per_class, full)
    scores = [
        Score(
            "few_shot", dataset.name, f"{p.shots} per class", dataset.metric, p.mean, n=len(targets)
        )
        for p in reversed(points)
    ]
    details = {
        "shots": shots,
        "mean": means,
        "deviation": [0.0 if math.isnan(p.deviation) else p.deviation for p in points],
        "strengths": [list(p.l2) for p in points],
        "unconverged": (unconverged := sum(p.unconverged for p in points)),
        "zero_shot": zero,
        "full": full,
        "full_shots": per_class,
        "labels_needed": needed if np.isfinite(needed) else None,
    }
    if unconverged:
        logging.warning("%s, few-shot probes: %s", dataset.title, sweep.warning(unconverged))
    return Findings(scores, details)


TASK = Task(
    title="Few-shot probes",
    splits=(TRAIN, VALIDATION, TEST),
    requires="classes with prompts, one to an image, and examples to train on",
    supports=lambda context, dataset: (
        linear_probe.TASK.supports(context, dataset)
        and recognizes(context, dataset)
        and not dataset.multi_label
    ),
    run=run,
    needs_features=True,
)
