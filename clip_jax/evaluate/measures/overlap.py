"""What overlap of a test set with the training data does to its accuracy (paper section 5)."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from clip_jax.errors import UserError
from clip_jax.evaluate.measures import intervals
from clip_jax.evaluate.measures.intervals import CONFIDENCE, Share

LEVEL = 0.05  # of significance, over all data sets together


@dataclass(frozen=True)
class Overlap:
    """A data set split by similarity to the training data, and the accuracy on each part.

    Attributes:
      threshold: examples at least so similar to a training example overlap.
      share: of all examples, those that do.
      all, overlap, clean: accuracies; NaN where a part is empty.
      inflation: accuracy on all minus that on the clean part, a fraction; above 0: the overlap
        makes the set look easier. NaN where nothing is clean.
      p_value: one-sided, for the overlapping part under the accuracy on the clean part; NaN where
        either is empty.
    """

    threshold: float
    share: float
    all: Share
    overlap: Share
    clean: Share
    inflation: float
    p_value: float


def analyse(
    correct: np.ndarray,
    similarity: np.ndarray,
    threshold: float,
    confidence: float = CONFIDENCE,
) -> Overlap:
    """The table's row of one data set.

    Args:
      correct: whether each example is classified rightly, bool [n].
      similarity: of each to its nearest training example, float [n].
      threshold: as in `Overlap`.
      confidence: of the intervals.

    Raises:
      UserError: no example, or a similarity that is not a number.
    """
    correct, similarity = np.asarray(correct, bool), np.asarray(similarity)
    if not len(correct):
        raise UserError("The overlap of a data set without examples cannot be analysed.")
    if np.isnan(similarity).any():
        raise UserError(
            f"{np.isnan(similarity).sum()} of {len(similarity)} similarities to the training data "
            "are not numbers: the detector's embeddings are broken."
        )
    near = similarity >= threshold
    whole, overlap, clean = (
        intervals.share(int(correct[part].sum()), int(part.sum()), confidence)
        for part in (np.ones_like(near), near, ~near)
    )
    tested = overlap.trials > 0 and clean.trials > 0
    return Overlap(
        threshold=float(threshold),
        share=float(near.mean()),
        all=whole,
        overlap=overlap,
        clean=clean,
        inflation=whole.value - clean.value,
        p_value=intervals.binomial_greater(overlap.successes, overlap.trials, clean.value)
        if tested
        else math.nan,
    )


def sweep(
    correct: np.ndarray,
    similarity: np.ndarray,
    thresholds: Iterable[float],
    confidence: float = CONFIDENCE,
) -> list[Overlap]:
    """The row at each threshold, for the choice of one."""
    return [analyse(correct, similarity, threshold, confidence) for threshold in thresholds]


def significant(found: Mapping[str, Overlap], level: float = LEVEL) -> list[str]:
    """Names of the data sets that overlap inflates, at `level` for all of them together.

    Bonferroni's correction counts the data sets that could be tested.
    """
    p_values = {name: row.p_value for name, row in found.items() if not math.isnan(row.p_value)}
    threshold = intervals.bonferroni(level, len(p_values))
    return [name for name, p_value in p_values.items() if p_value < threshold]
