"""What a task is given, and what all tasks do alike."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from clip_jax.evaluate.embedding_source import Material, Training
from clip_jax.evaluate.measures import sweep
from clip_jax.evaluate.measures.metrics import METRICS
from clip_jax.evaluate.results import Found, Score
from clip_jax.evaluate.sets.dataset import Dataset
from clip_jax.evaluate.settings import Settings


@dataclasses.dataclass(frozen=True)
class Context:
    """What stays the same over all data sets.

    Attributes:
      material: the model's view of them.
      settings: of the evaluation.
      datasets: all that are evaluated.
      training: the training data, for the analysis of overlap; None: not given.
      probes: of data sets, filled as they are made.
    """

    material: Material
    settings: Settings
    datasets: Sequence[Dataset]
    training: Training | None = None
    probes: dict[str, sweep.Probe] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Task:
    """One of the paper's protocols.

    Attributes:
      title: for people.
      roles: splits that it needs of a data set.
      takes: what it can be done with, for people.
      applies: whether it can be done on a data set at all.
      run: does it.
    """

    title: str
    roles: tuple[str, ...]
    takes: str
    applies: Callable[[Context, Dataset], bool]
    run: Callable[[Context, Dataset], Found]


def recognizes(context: Context, dataset: Dataset) -> bool:
    """Whether the model can be asked, by prompts, which class an image has."""
    named = dataset.kind == "classification" and bool(dataset.prompts)
    return named and context.material.can_score_text


def measure(
    task: str,
    dataset: Dataset,
    variant: str,
    scores: np.ndarray,
    targets: np.ndarray,
    settings: Settings,
) -> Score:
    """The data set's metric of scores [n, classes], with its interval and what guessing reaches."""
    metric = METRICS[dataset.metric]
    low, high = metric.interval(scores, targets, settings.confidence)
    return Score(
        task=task,
        dataset=dataset.name,
        variant=variant,
        metric=dataset.metric,
        value=metric(scores, targets),
        low=low,
        high=high,
        n=len(scores),
        chance=chance(dataset),
    )


def chance(dataset: Dataset) -> float | None:
    """What guessing reaches, where that does not depend on the data; None: it does."""
    classes = len(dataset.class_names)
    if dataset.metric in ("accuracy", "mean_per_class"):
        return 1 / classes
    if dataset.metric == "roc_auc":
        return 0.5
    if dataset.metric == "mean_top1_top5":
        return (1 + min(5, classes)) / (2 * classes)
    return None
