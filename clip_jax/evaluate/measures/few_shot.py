"""Few-shot linear probes, and what zero-shot saves in labels (paper, section 3.1, figures 6 and 7).

Each repeat draws examples of every class by its seed, nested: those of two shots are the first two
of four, so that a repeat's curve rises by what is added. The strength is chosen on the validation
set as for a full probe (`sweep`), and nothing is fitted to that set.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from clip_jax.errors import UserError
from clip_jax.evaluate.measures import logistic, sweep
from clip_jax.evaluate.measures.sweep import Metric, Split

SHOTS = (1, 2, 4, 8, 16)  # the paper's; it takes sets with at least 16 examples of each class
REPEATS = 3


class Point(NamedTuple):
    """Probes trained on so many examples of each class.

    Attributes:
      shots: examples of each class.
      scores: on the test set, of each repeat.
      strengths: chosen, of each repeat.
    """

    shots: int
    scores: tuple[float, ...]
    strengths: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores))

    @property
    def deviation(self) -> float:
        """Of a sample, over the repeats; NaN if there is one."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else math.nan


def curve(
    train: Split,
    validation: Split,
    test: Split,
    metric: Metric,
    classes: int,
    mesh: Mesh,
    shots: Sequence[int] = SHOTS,
    repeats: int = REPEATS,
    seed: int = 0,
) -> list[Point]:
    """Probes trained on few examples, in ascending order of shots.

    Args:
      train: to draw from; its targets, as all, int [n].
      validation: for the choice of the strength; `sweep.hold_out` makes one where there is none.
      test: that the scores are of.
      metric: whose highest score is best.
      classes: c.
      mesh: devices that examples are split over.
      shots: examples of each class.
      repeats: draws; number r is that of seed + r.
      seed: of the first draw.

    Raises:
      UserError: a class with fewer examples than are to be drawn, or as of `logistic.fit`.
    """
    shots = sorted(shots)
    draws = [draw(train.targets, shots[-1], classes, seed + r) for r in range(repeats)]
    points = []
    for count in shots:
        scores, strengths = [], []
        for drawn in draws:
            few = Split(*(part[drawn[:count].ravel()] for part in train))
            # Padded alike, all draws of all numbers of shots share two programs.
            choice = sweep.choose(few, validation, metric, classes, mesh, rows=drawn.size)
            found = logistic.scores(choice.fitted, test.features, mesh)[0]
            scores.append(metric(found, test.targets))
            strengths.append(choice.best.strength)
        points.append(Point(count, tuple(scores), tuple(strengths)))
    return points


def draw(targets: np.ndarray, shots: int, classes: int, seed: int) -> np.ndarray:
    """Places of examples drawn by a seed, int [shots, classes]: column c holds some of class c.

    Raises:
      UserError: a class has fewer, or an example has several.
    """
    if targets.ndim != 1:
        raise UserError(
            "Few-shot probes draw examples by class, but these examples have several labels each: "
            "leave this data set out of the task few_shot."
        )
    counts = np.bincount(targets, minlength=classes)
    if counts.min() < shots:
        raise UserError(
            f"Class {counts.argmin()} has {counts.min()} training examples, but {shots} of each "
            f"class are to be drawn. The paper's few-shot curves are of sets with at least "
            f"{SHOTS[-1]}: take fewer shots, or leave this data set out of the task few_shot."
        )
    rng = np.random.default_rng(seed)
    members = (np.flatnonzero(targets == number) for number in range(classes))
    return np.stack([rng.permutation(places)[:shots] for places in members], axis=1)


def labels_needed(
    zero_shot: float,
    shots: Sequence[float],
    accuracies: Sequence[float],
    full_shots: float,
    full_accuracy: float,
) -> float:
    """Labelled examples per class with which a probe is as good as zero-shot (figure 7).

    Accuracy is taken to be linear in the logarithm of their number between the points known; where
    the curve crosses zero-shot's accuracy several times, the first time counts.

    Args:
      zero_shot: accuracy.
      shots: examples per class of the few-shot probes.
      accuracies: of these.
      full_shots: examples per class, in the mean, of the whole training set.
      full_accuracy: of the probe trained on it.

    Returns:
      The estimate; the fewest shots where these are good enough already, so that it is a bound;
      infinity where the whole set is not enough.
    """
    points = sorted({**dict(zip(shots, accuracies)), full_shots: full_accuracy}.items())
    (fewest, first), rest = points[0], points[1:]
    if first >= zero_shot:
        return float(fewest)
    below, low = fewest, first
    for above, high in rest:
        if high >= zero_shot:
            return float(below * (above / below) ** ((zero_shot - low) / (high - low)))
        below, low = above, high
    return math.inf
