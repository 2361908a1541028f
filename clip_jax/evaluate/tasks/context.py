"""The inputs of a task, and computations that several tasks have in common."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict

from clip_jax.evaluate.embedding_source import EmbeddingSource, TrainingData
from clip_jax.evaluate.measures.metrics import METRICS
from clip_jax.evaluate.results import Findings, Score
from clip_jax.evaluate.sets.dataset import Dataset

if TYPE_CHECKING:
    from clip_jax.evaluate.measures.sweep import Probe


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of tasks; see the fields of the same names under `eval` in configs/default.py.

    Attributes:
      thresholds: overlap thresholds of single data sets, by name; set by the command only.
      testbed: path of a table of other models' accuracies; set by the command only.
    """

    prompts: str
    confidence: float
    shots: tuple[int, ...]
    repeats: int
    retrieval_prompt: str
    label_thresholds: tuple[float, ...]
    overlap_threshold: float
    seed: int
    thresholds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    testbed: str = ""

    @classmethod
    def from_config(
        cls,
        evals: ConfigDict,
        seed: int,
        thresholds: Mapping[str, float] | None = None,
        testbed: str = "",
    ) -> "Settings":
        """Takes the settings from config.eval."""
        return cls(
            prompts=evals.prompts,
            confidence=evals.confidence,
            shots=evals.shots,
            repeats=evals.repeats,
            retrieval_prompt=evals.retrieval_prompt,
            label_thresholds=evals.label_thresholds,
            overlap_threshold=evals.overlap_threshold,
            seed=seed,
            thresholds=thresholds or {},
            testbed=testbed,
        )


@dataclasses.dataclass(frozen=True)
class Context:
    """The inputs of tasks that do not depend on the data set.

    Attributes:
      embeddings: the model's embeddings of the data sets.
      settings: settings of the tasks.
      datasets: data sets of the evaluation, among which a shift has its reference set.
      training: the training data, for the analysis of overlap; None: not given.
      headline_only: skip the variants that are not logged, such as single prompts beside the
        ensemble; for evaluation during training.
      probes: linear probes by data set, added as they are fitted.
    """

    embeddings: EmbeddingSource
    settings: Settings
    datasets: Sequence[Dataset]
    training: TrainingData | None = None
    headline_only: bool = False
    probes: dict[str, "Probe"] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Task:
    """One of the paper's protocols.

    Attributes:
      title: title for people.
      splits: splits that it needs of a data set.
      requires: description of the data and the model that it needs, for people.
      supports: whether it can be done on a data set at all.
      run: function that runs it.
      needs_features: whether it reads pre-projection features.
    """

    title: str
    splits: tuple[str, ...]
    requires: str
    supports: Callable[[Context, Dataset], bool]
    run: Callable[[Context, Dataset], Findings]
    needs_features: bool = False


def recognizes(context: Context, dataset: Dataset) -> bool:
    """Returns whether the model can classify the images of a data set by prompts."""
    named = dataset.kind == "classification" and bool(dataset.prompts)
    return named and context.embeddings.can_score_text


def measure(
    task: str,
    dataset: Dataset,
    variant: str,
    scores: np.ndarray,
    targets: np.ndarray,
    settings: Settings,
) -> Score:
    """Computes the data set's metric from scores [n, classes], with its interval and chance."""
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
    """Returns the score that guessing reaches; None if it depends on the data."""
    classes = len(dataset.class_names)
    if dataset.metric in ("accuracy", "mean_per_class"):
        return 1 / classes
    if dataset.metric == "roc_auc":
        return 0.5
    if dataset.metric == "mean_top1_top5":
        return (1 + min(5, classes)) / (2 * classes)
    return None
