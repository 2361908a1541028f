"""Linear probes: logistic regression on features (paper section 3.2)."""

import logging

from clip_jax.evaluate.embedding_source import TEST, TRAIN, VALIDATION, labelled
from clip_jax.evaluate.measures import sweep
from clip_jax.evaluate.measures.metrics import METRICS
from clip_jax.evaluate.results import Findings
from clip_jax.evaluate.sets.dataset import Dataset
from clip_jax.evaluate.tasks.context import Context, Task, measure


def features(context: Context, dataset: Dataset, split: str) -> sweep.Split:
    """Returns features and targets of a split."""
    examples, targets = labelled(context.embeddings, dataset, split)
    return sweep.Split(examples.features, targets)


def probe(context: Context, dataset: Dataset) -> sweep.Probe:
    """Returns the probe of a data set, fitted once, since other tasks use it too."""
    if dataset.name not in context.probes:
        train, validation, test = (
            features(context, dataset, split) for split in (TRAIN, VALIDATION, TEST)
        )
        metric, classes = METRICS[dataset.metric], len(dataset.class_names)
        context.probes[dataset.name] = sweep.probe(
            train, validation, test, metric, classes, context.embeddings.mesh
        )
    return context.probes[dataset.name]


def run(context: Context, dataset: Dataset) -> Findings:
    """Chooses the L2 strength on validation data, then fits to training and validation data."""
    found = probe(context, dataset)
    train, validation, test = (
        features(context, dataset, split) for split in (TRAIN, VALIDATION, TEST)
    )
    score = measure(
        "linear_probe",
        dataset,
        "linear probe",
        found.test_scores,
        test.targets,
        context.settings,
    )
    details = {
        "strength": found.l2,
        "validation_score": max(point.score for point in found.points),
        "points": [list(point) for point in found.points],
        "unconverged": found.unconverged,
        "train": len(train.targets),
        "validation": len(validation.targets),
        "width": train.features.shape[1],
    }
    if found.unconverged:
        logging.warning("%s, linear probe: %s", dataset.title, sweep.warning(found.unconverged))
    return Findings([score], details)


TASK = Task(
    title="Linear probe",
    splits=(TRAIN, VALIDATION, TEST),
    requires="classes, and examples to train on",
    supports=lambda context, dataset: (
        dataset.kind == "classification" and {TRAIN, VALIDATION, TEST} <= set(dataset.splits)
    ),
    run=run,
    needs_features=True,
)
