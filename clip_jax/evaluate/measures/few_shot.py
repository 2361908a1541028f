"""Few-shot linear probes, and the labels that zero-shot saves (paper section 3.1, figures 6 and 7).

Each repeat draws examples of every class by its seed. The draws are nested: the examples of two
shots are the first two of four, so the curve of a repeat rises by the added examples alone. The L2
penalty is chosen on the validation set as for a full probe (`sweep`), and nothing is fitted to that
set.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Integer, Shaped

from clip_jax.errors import UserError
from clip_jax.evaluate.measures import logistic, sweep
from clip_jax.evaluate.measures.sweep import Metric, Split

SHOTS = (1, 2, 4, 8, 16)  # the paper's, on sets with at least 16 examples of each class
REPEATS = 3


class Point(NamedTuple):
    """Probes trained on one number of examples per class.

    Attributes:
      shots: examples of each class.
      scores: test score of each repeat.
      l2: chosen L2 penalty of each repeat.
      unconverged: number of fits, over all penalties and repeats, that have not converged.
    """

    shots: int
    scores: tuple[float, ...]
    l2: tuple[float, ...]
    unconverged: int

    @property
    def mean(self) -> float:
        """The mean score of the repeats."""
        return float(np.mean(self.scores))

    @property
    def deviation(self) -> float:
        """The sample standard deviation over the repeats; NaN of a single one."""
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
    """Scores probes trained on few examples, in ascending order of shots.

    Args:
      train: examples to draw from, with one class each.
      validation: examples for the choice of the L2 penalty; `sweep.hold_out` makes a set where
        there is none.
      test: examples for the scores.
      metric: higher is better.
      classes: number of classes.
      mesh: devices to split the examples over.
      shots: numbers of examples per class.
      repeats: number of draws; draw r has the seed `seed` + r.
      seed: seed of the first draw.

    Raises:
      UserError: a class has fewer examples than are to be drawn, or `logistic.fit` raises it.
    """
    shots = sorted(shots)
    draws = [draw(train.targets, shots[-1], classes, seed + r) for r in range(repeats)]
    points = []
    for count in shots:
        scores, penalties, unconverged = [], [], 0
        for drawn in draws:
            few = Split(*(part[drawn[:count].ravel()] for part in train))
            # Padded to one size, all draws of all numbers of shots share two programs.
            choice = sweep.choose(few, validation, metric, classes, mesh, rows=drawn.size)
            found = logistic.scores(choice.fitted, test.features, mesh)[0]
            scores.append(metric(found, test.targets))
            penalties.append(choice.best.l2)
            unconverged += choice.unconverged
        points.append(Point(count, tuple(scores), tuple(penalties), unconverged))
    return points


def draw(
    targets: Shaped[np.ndarray, " n *classes"], shots: int, classes: int, seed: int
) -> Integer[np.ndarray, " {shots} {classes}"]:
    """Draws examples of each class by a seed.

    Args:
      targets: class of each example.
      shots: examples of each class.
      classes: number of classes.
      seed: draws of one seed are nested.

    Returns:
      Positions of the examples; column c holds examples of class c.

    Raises:
      UserError: a class has fewer examples, or an example has several classes.
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
    return np.stack([rng.permutation(positions)[:shots] for positions in members], axis=1)


def labels_needed(
    zero_shot: float,
    shots: Sequence[int],
    accuracies: Sequence[float],
    full_shots: float,
    full_accuracy: float,
) -> float:
    """Estimates the labelled examples per class with which a probe equals zero-shot (figure 7).

    Accuracy is interpolated linearly in the logarithm of the number of examples. Where the curve
    crosses zero-shot's accuracy several times, the first crossing counts.

    Args:
      zero_shot: accuracy of zero-shot classification.
      shots: examples per class of the few-shot probes.
      accuracies: accuracy of each of these probes.
      full_shots: mean examples per class of the whole training set.
      full_accuracy: accuracy of the probe trained on the whole set.

    Returns:
      The estimate; an upper bound, the fewest shots, where these suffice already; infinity where
      the whole set does not suffice.
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
