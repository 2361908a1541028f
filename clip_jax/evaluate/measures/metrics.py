"""The metrics of the paper's data sets, each a number in [0, 1] with a confidence interval.

Ties count against the model, except in ROC AUC, where a tied pair counts half by definition. A
score that is NaN is wrong wherever it stands.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from clip_jax.errors import UserError
from clip_jax.evaluate.measures import intervals
from clip_jax.evaluate.measures.intervals import CONFIDENCE

RESAMPLES = 2000  # of the bootstrap: each of the paper's tails, 0.25 %, still has five
_SEED = 0  # of the bootstrap: the same data have the same interval
_LEVELS = 10  # recalls 0, 1/10, ..., 1: VOC2007's eleven points

# How often each example counts, int [n] -> the metric; what is slow is done before.
Weigh = Callable[[np.ndarray], float]


@dataclass(frozen=True)
class Metric:
    """Called with scores float [n, c], higher: more likely, and targets -> float in [0, 1].

    Attributes:
      title: for people.
      multi_label: targets are bool [n, c], or int8 with -1 where an entry is to be ignored;
        otherwise class numbers, int [n].
      is_share: of independent trials, so that its interval is Clopper-Pearson's; otherwise it is a
        percentile bootstrap over the examples.
      prepare: (scores, targets) -> `Weigh`.
    """

    title: str
    multi_label: bool
    is_share: bool
    prepare: Callable[[np.ndarray, np.ndarray], Weigh]

    def __call__(self, scores: np.ndarray, targets: np.ndarray) -> float:
        """UserError where the metric is not defined: no example, a class number too high, ..."""
        return self.prepare(scores, targets)(np.ones(len(scores), np.int64))

    def interval(
        self,
        scores: np.ndarray,
        targets: np.ndarray,
        confidence: float = CONFIDENCE,
        resamples: int = RESAMPLES,
    ) -> tuple[float, float]:
        """(low, high). A resample in which the metric is not defined is left out.

        Args:
          scores, targets: as the metric's.
          confidence: of the interval.
          resamples: of the bootstrap; each takes some milliseconds per 100,000 examples (and per
            class, where multi-label), and memory for a few numbers per example.
        """
        weigh, n = self.prepare(scores, targets), len(scores)
        if self.is_share:
            right = round(n * weigh(np.ones(n, np.int64)))
            return intervals.clopper_pearson(right, n, confidence)
        rng = np.random.default_rng(_SEED)
        found = [weigh(np.bincount(rng.integers(n, size=n), minlength=n)) for _ in range(resamples)]
        tail = (1 - confidence) / 2
        low, high = np.nanquantile(found, [tail, 1 - tail])
        return float(low), float(high)


def correct(scores: np.ndarray, targets: np.ndarray, k: int = 1) -> np.ndarray:
    """Whether fewer than k other classes have at least the score of the right one.

    Args:
      scores: float [n, c].
      targets: int [n].
      k: 1: the right class is first.

    Returns:
      bool [n].
    """
    scores, targets = _single_label(scores, targets)
    own = np.take_along_axis(scores, targets[:, None], axis=1)
    not_below = np.sum(~(scores < own), axis=1)  # the right class itself among them
    return (not_below <= k) & ~np.isnan(own[:, 0])


def _accuracy(scores: np.ndarray, targets: np.ndarray) -> Weigh:
    return _mean(correct(scores, targets))


def _mean_top1_top5(scores: np.ndarray, targets: np.ndarray) -> Weigh:
    return _mean((correct(scores, targets).astype(float) + correct(scores, targets, k=5)) / 2)


def _mean(values: np.ndarray) -> Weigh:
    return lambda weights: float(weights @ values / weights.sum())


def _mean_per_class(scores: np.ndarray, targets: np.ndarray) -> Weigh:
    scores, targets = _single_label(scores, targets)
    right = correct(scores, targets)
    order, starts = _runs(targets)

    def weigh(weights: np.ndarray) -> float:
        weights = weights[order]
        sizes = np.add.reduceat(weights, starts)
        hits = np.add.reduceat(weights * right[order], starts)
        there = sizes > 0
        return float(np.mean(hits[there] / sizes[there]))

    return weigh


def _roc_auc(scores: np.ndarray, targets: np.ndarray) -> Weigh:
    scores, targets = _single_label(scores, targets)
    if scores.shape[1] != 2 or len(np.unique(targets)) != 2:
        raise UserError(
            f"ROC AUC takes two classes with examples of both; here are {scores.shape[1]} classes, "
            f"of which {len(np.unique(targets))} have examples."
        )
    positive = targets == 1
    with np.errstate(invalid="ignore"):  # infinity less infinity: NaN, wrong
        margin = scores[:, 1].astype(np.float64) - scores[:, 0]
    levels = np.unique(margin, return_inverse=True)[1]
    levels[np.isnan(margin)] = np.where(positive, -1, len(margin))[np.isnan(margin)]
    order, starts = _runs(levels)

    def weigh(weights: np.ndarray) -> float:
        hits = np.add.reduceat((weights * positive)[order], starts)
        misses = np.add.reduceat((weights * ~positive)[order], starts)
        pairs = hits.sum() * misses.sum()
        below = np.cumsum(misses) - misses
        return float(hits @ (below + misses / 2) / pairs) if pairs else np.nan

    return weigh


def _map_11_point(scores: np.ndarray, targets: np.ndarray) -> Weigh:
    scores, targets = np.asarray(scores), np.asarray(targets)
    if scores.shape != targets.shape or scores.ndim != 2 or not (targets == 1).any():
        raise UserError(
            "Mean average precision takes scores and targets [n, c] with at least one entry that "
            f"is true; here are scores {list(scores.shape)} and targets {list(targets.shape)}."
        )
    classes = [_average_precision(*columns) for columns in zip(scores.T, targets.T)]

    def weigh(weights: np.ndarray) -> float:
        found = np.array([one(weights) for one in classes])
        there = ~np.isnan(found)
        return float(found[there].mean()) if there.any() else np.nan

    return weigh


def _average_precision(scores: np.ndarray, targets: np.ndarray) -> Weigh:
    """Of one class: the mean over eleven recalls of the best precision at that recall or more.

    Precision and recall are of all examples that score at least as high as some example, so the
    order of equal ones does not matter. NaN where no example is positive.
    """
    positive, counted = targets == 1, targets != -1
    # NaN: a positive behind, a negative before every other.
    heights = np.where(np.isnan(scores), np.where(positive, -np.inf, np.inf), scores)
    order = np.argsort(-heights, kind="stable")
    heights, positive, counted = heights[order], positive[order], counted[order]
    ends = np.append(np.flatnonzero(heights[1:] != heights[:-1]), len(heights) - 1)

    def weigh(weights: np.ndarray) -> float:
        weights = weights[order]
        found, shown = np.cumsum(weights * positive)[ends], np.cumsum(weights * counted)[ends]
        if not found[-1]:
            return np.nan
        precision = np.divide(found, shown, out=np.zeros(len(ends)), where=shown > 0)
        best = np.maximum.accumulate(precision[::-1])[::-1]
        # The recall k / 10 is reached by the k/10-th part of the positives, rounded up.
        needed = -(-np.arange(_LEVELS + 1) * found[-1] // _LEVELS)
        return float(best[np.searchsorted(found, needed)].mean())

    return weigh


def _runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An order in which equal values are neighbours, ascending, and where each run begins."""
    order = np.argsort(values, kind="stable")
    return order, np.flatnonzero(np.diff(values[order], prepend=values[order[0]] - 1))


def _single_label(scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, targets = np.asarray(scores), np.asarray(targets)
    if scores.ndim != 2 or targets.shape != scores.shape[:1] or not len(scores):
        raise UserError(
            "A metric takes scores [n, c] and class numbers [n] of at least one example; here are "
            f"scores {list(scores.shape)} and class numbers {list(targets.shape)}."
        )
    if targets.min() < 0 or targets.max() >= scores.shape[1]:
        raise UserError(
            f"The class numbers go from {targets.min()} to {targets.max()}, but scores are given "
            f"for 0 to {scores.shape[1] - 1}: class names and labels do not belong together."
        )
    return scores, targets.astype(np.int64)


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("accuracy", False, True, _accuracy),
    "mean_per_class": Metric("mean accuracy per class", False, False, _mean_per_class),
    "map_11_point": Metric("11-point mAP", True, False, _map_11_point),
    "roc_auc": Metric("ROC AUC", False, False, _roc_auc),
    "mean_top1_top5": Metric("mean of top-1 and top-5", False, False, _mean_top1_top5),
}
