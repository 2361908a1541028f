"""The effect on accuracy of a test set's overlap with the training data (paper section 5)."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from clip_jax.errors import UserError
from clip_jax.evaluate.measures import intervals
from clip_jax.evaluate.measures.intervals import CONFIDENCE, Proportion

LEVEL = 0.05  # significance level, over all data sets together


@dataclass(frozen=True)
class Overlap:
    """A data set split by similarity to the training data, and the accuracy on each part.

    Attributes:
      threshold: an example overlaps where its similarity to a training example is at least this.
      fraction: fraction of the examples that overlap.
      all, overlap, clean: accuracies; NaN where a part is empty.
      inflation: accuracy on all minus that on the clean part, a fraction; positive where the
        overlap makes the set look easier, NaN where nothing is clean.
      p_value: one-sided, for the overlapping part under the accuracy on the clean part; NaN where
        either is empty.
    """

    threshold: float
    fraction: float
    all: Proportion
    overlap: Proportion
    clean: Proportion
    inflation: float
    p_value: float


def analyse(
    correct: Bool[np.ndarray, " n"],
    similarity: Float[np.ndarray, " n"],
    threshold: float,
    confidence: float = CONFIDENCE,
) -> Overlap:
    """Computes the table's row of one data set.

    Args:
      correct: whether each example is classified correctly.
      similarity: similarity of each to its nearest training example.
      threshold: least similarity of an overlapping example.
      confidence: coverage of the intervals.

    Raises:
      UserError: no example, or a similarity that is not a number.
    """
    if not len(correct):
        raise UserError("The overlap of a data set without examples cannot be analysed.")
    if np.isnan(similarity).any():
        raise UserError(
            f"{np.isnan(similarity).sum()} of {len(similarity)} similarities to the training data "
            "are not numbers: the detector's embeddings are broken."
        )
    near = similarity >= threshold
    whole, overlap, clean = (
        intervals.proportion(int(correct[part].sum()), int(part.sum()), confidence)
        for part in (np.ones_like(near), near, ~near)
    )
    tested = overlap.trials > 0 and clean.trials > 0
    return Overlap(
        threshold=float(threshold),
        fraction=float(near.mean()),
        all=whole,
        overlap=overlap,
        clean=clean,
        inflation=whole.value - clean.value,
        p_value=intervals.binomial_greater(overlap.successes, overlap.trials, clean.value)
        if tested
        else math.nan,
    )


def sweep(
    correct: Bool[np.ndarray, " n"],
    similarity: Float[np.ndarray, " n"],
    thresholds: Iterable[float],
    confidence: float = CONFIDENCE,
) -> list[Overlap]:
    """Computes the row at each threshold, for the choice of one."""
    return [analyse(correct, similarity, threshold, confidence) for threshold in thresholds]


def significant(found: Mapping[str, Overlap], level: float = LEVEL) -> list[str]:
    """Returns the data sets that overlap inflates, at `level` for all of them together.

    Bonferroni's correction counts the data sets that could be tested.
    """
    p_values = {name: row.p_value for name, row in found.items() if not math.isnan(row.p_value)}
    threshold = intervals.bonferroni(level, len(p_values))
    return [name for name, p_value in p_values.items() if p_value < threshold]
