"""Linear probes: logistic regression on features (paper section 3.2)."""

from clip_jax.evaluate.embedding_source import TEST, TRAIN, VALIDATION, labelled
from clip_jax.evaluate.measures import sweep
from clip_jax.evaluate.measures.metrics import METRICS
from clip_jax.evaluate.results import Found
from clip_jax.evaluate.sets.dataset import Dataset
from clip_jax.evaluate.tasks.context import Context, Task, measure


def split(context: Context, dataset: Dataset, role: str) -> sweep.Split:
    """Features and targets of a split."""
    examples, targets = labelled(context.material, dataset, role)
    return sweep.Split(examples.features, targets)


def probe(context: Context, dataset: Dataset) -> sweep.Probe:
    """The probe of a data set; made once, as others build on it."""
    if dataset.name not in context.probes:
        train, validation, test = (
            split(context, dataset, role) for role in (TRAIN, VALIDATION, TEST)
        )
        metric, classes = METRICS[dataset.metric], len(dataset.class_names)
        context.probes[dataset.name] = sweep.probe(
            train, validation, test, metric, classes, context.material.mesh
        )
    return context.probes[dataset.name]


def run(context: Context, dataset: Dataset) -> Found:
    """The strength that does best on validation, then fitted to training and validation data."""
    found = probe(context, dataset)
    train, validation, test = (split(context, dataset, role) for role in (TRAIN, VALIDATION, TEST))
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
        "train": len(train.targets),
        "validation": len(validation.targets),
        "width": train.features.shape[1],
    }
    return Found([score], details)


TASK = Task(
    title="Linear probe",
    roles=(TRAIN, VALIDATION, TEST),
    takes="classes, and examples to train on",
    applies=lambda context, dataset: (
        dataset.kind == "classification" and {TRAIN, VALIDATION, TEST} <= set(dataset.splits)
    ),
    run=run,
)
