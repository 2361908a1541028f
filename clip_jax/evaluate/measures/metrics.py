"""The metrics of the paper's data sets, each a number in [0, 1] with a confidence interval.

Ties count against the model, except in ROC AUC, where a tied pair counts half by definition. A
score that is NaN is wrong wherever it stands.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped

from clip_jax.errors import UserError
from clip_jax.evaluate.measures import intervals
from clip_jax.evaluate.measures.intervals import CONFIDENCE

RESAMPLES = 2000  # bootstrap resamples: each of the paper's tails, 0.25 %, still has five
_SEED = 0  # fixed seed of the bootstrap, so that the same data have the same interval
_LEVELS = 10  # recalls 0, 1/10, ..., 1: VOC2007's eleven points

# m is n and k is c, which the metrics check themselves, with a message that helps.
Scores = Float[np.ndarray, "n c"]
ClassIds = Integer[np.ndarray, " m"]
Targets = ClassIds | Bool[np.ndarray, "m k"] | Integer[np.ndarray, "m k"]
# The metric as a function of the number of times that each example counts, int [n]. The work that
# all bootstrap resamples share, such as sorting, is done before.
WeightedMetric = Callable[[Integer[np.ndarray, " n"]], float]


@dataclass(frozen=True)
class Metric:
    """A metric of scores, higher for more likely classes, and targets: a number in [0, 1].

    Attributes:
      title: name in reports.
      multi_label: whether targets are bool [n, c], or int8 with -1 for entries to ignore;
        otherwise they are class ids, int [n].
      is_proportion: whether it is a proportion of independent trials, with Clopper-Pearson's
        interval; otherwise the interval is a percentile bootstrap over the examples.
      prepare: returns the weighted metric of scores and targets.
    """

    title: str
    multi_label: bool
    is_proportion: bool
    prepare: Callable[[Scores, Targets], WeightedMetric]

    def __call__(self, scores: Scores, targets: Targets) -> float:
        """Computes the metric.

        Raises:
          UserError: it is not defined: no example, a class id that is too high, ...
        """
        return self.prepare(scores, targets)(np.ones(len(scores), np.int64))

    def interval(
        self,
        scores: Scores,
        targets: Targets,
        confidence: float = CONFIDENCE,
        resamples: int = RESAMPLES,
    ) -> tuple[float, float]:
        """Computes the confidence interval (low, high).

        A resample in which the metric is not defined is left out.

        Args:
          scores, targets: arguments of the metric.
          confidence: coverage of the interval.
          resamples: bootstrap resamples; each takes some milliseconds per 100,000 examples (and
            per class, where multi-label), and memory for a few numbers per example.
        """
        weighted_metric, n = self.prepare(scores, targets), len(scores)
        if self.is_proportion:
            right = round(n * weighted_metric(np.ones(n, np.int64)))
            return intervals.clopper_pearson(right, n, confidence)
        rng = np.random.default_rng(_SEED)
        draws = (np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(resamples))
        found = [weighted_metric(counts) for counts in draws]
        tail = (1 - confidence) / 2
        low, high = np.nanquantile(found, [tail, 1 - tail])
        return float(low), float(high)


def correct(scores: Scores, targets: ClassIds, k: int = 1) -> Bool[np.ndarray, " n"]:
    """Tells for each example whether the right class is among the k best.

    It is where fewer than k other classes have at least its score.
    """
    scores, targets = _single_label(scores, targets)
    own = np.take_along_axis(scores, targets[:, None], axis=1)
    not_below = np.sum(~(scores < own), axis=1)  # the right class itself among them
    return (not_below <= k) & ~np.isnan(own[:, 0])


def _accuracy(scores: Scores, targets: Targets) -> WeightedMetric:
    return _mean(correct(scores, targets))


def _mean_top1_top5(scores: Scores, targets: Targets) -> WeightedMetric:
    return _mean((correct(scores, targets).astype(float) + correct(scores, targets, k=5)) / 2)


def _mean(values: Shaped[np.ndarray, " n"]) -> WeightedMetric:
    return lambda weights: float(weights @ values / weights.sum())


def _mean_per_class(scores: Scores, targets: Targets) -> WeightedMetric:
    scores, targets = _single_label(scores, targets)
    right = correct(scores, targets)
    order, starts = _runs(targets)

    def weighted_metric(weights: Integer[np.ndarray, " n"]) -> float:
        weights = weights[order]
        sizes = np.add.reduceat(weights, starts)
        hits = np.add.reduceat(weights * right[order], starts)
        present = sizes > 0
        return float(np.mean(hits[present] / sizes[present]))

    return weighted_metric


def _roc_auc(scores: Scores, targets: Targets) -> WeightedMetric:
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

    def weighted_metric(weights: Integer[np.ndarray, " n"]) -> float:
        hits = np.add.reduceat((weights * positive)[order], starts)
        misses = np.add.reduceat((weights * ~positive)[order], starts)
        pairs = hits.sum() * misses.sum()
        below = np.cumsum(misses) - misses
        return float(hits @ (below + misses / 2) / pairs) if pairs else np.nan

    return weighted_metric


def _map_11_point(scores: Scores, targets: Targets) -> WeightedMetric:
    scores, targets = np.asarray(scores), np.asarray(targets)
    if scores.shape != targets.shape or scores.ndim != 2 or not (targets == 1).any():
        raise UserError(
            "Mean average precision takes scores and targets [n, c] with at least one entry that "
            f"is true; here are scores {list(scores.shape)} and targets {list(targets.shape)}."
        )
    classes = [_average_precision(*columns) for columns in zip(scores.T, targets.T)]

    def weighted_metric(weights: Integer[np.ndarray, " n"]) -> float:
        found = np.array([one(weights) for one in classes])
        defined = ~np.isnan(found)
        return float(found[defined].mean()) if defined.any() else np.nan

    return weighted_metric


def _average_precision(
    scores: Float[np.ndarray, " n"], targets: Bool[np.ndarray, " n"] | Integer[np.ndarray, " n"]
) -> WeightedMetric:
    """Prepares the average precision of one class, as VOC2007 defines it.

    It is the mean over eleven recalls of the best precision at that recall or more; NaN where no
    example is positive. Precision and recall are taken at score thresholds, so the order of equal
    scores does not matter.
    """
    positive, counted = targets == 1, targets != -1
    # A NaN is wrong: a positive goes behind all others, a negative before them.
    heights = np.where(np.isnan(scores), np.where(positive, -np.inf, np.inf), scores)
    order = np.argsort(-heights, kind="stable")
    heights, positive, counted = heights[order], positive[order], counted[order]
    ends = np.append(np.flatnonzero(heights[1:] != heights[:-1]), len(heights) - 1)

    def weighted_metric(weights: Integer[np.ndarray, " n"]) -> float:
        weights = weights[order]
        hits, shown = np.cumsum(weights * positive)[ends], np.cumsum(weights * counted)[ends]
        if not hits[-1]:
            return np.nan
        precision = np.divide(hits, shown, out=np.zeros(len(ends)), where=shown > 0)
        best = np.maximum.accumulate(precision[::-1])[::-1]
        # The recall k / 10 is reached by the k/10-th part of the positives, rounded up.
        needed = -(-np.arange(_LEVELS + 1) * hits[-1] // _LEVELS)
        return float(best[np.searchsorted(hits, needed)].mean())

    return weighted_metric


def _runs(
    values: Integer[np.ndarray, " n"],
) -> tuple[Integer[np.ndarray, " n"], Integer[np.ndarray, " runs"]]:
    """Sorts values; returns the order, and where each run of equal values begins."""
    order = np.argsort(values, kind="stable")
    return order, np.flatnonzero(np.diff(values[order], prepend=values[order[0]] - 1))


def _single_label(scores: Scores, targets: Targets) -> tuple[Scores, ClassIds]:
    """Checks scores and class ids."""
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
