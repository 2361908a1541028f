"""A coarse-to-fine search for the linear probe's L2 penalty on a validation set (paper, A.3).

Penalties lie between 1e-6 and 1e6, eight to the decade: 96 steps, 97 values. Every 16th is tried,
two decades apart; then the interval around the best is halved until its neighbours have been
tried. That is 15 fits, or fewer at an edge of the range. Of penalties that score the same the
largest is taken: the simpler classifier, and the one whose fit is the better determined.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Shaped

from clip_jax.evaluate.measures import logistic

STEPS = 8  # per decade
_EDGE = 6 * STEPS  # penalties are 10 ** (exponent / STEPS), exponents from -_EDGE to _EDGE
_COARSE = 2 * STEPS  # distance of the first exponents
# Fits in one product: as many as a round asks for. Neighbours take similar numbers of iterations.
_AT_ONCE = 2

# Arguments: decision values [n, c] and targets.
Metric = Callable[[Float[np.ndarray, "n c"], Shaped[np.ndarray, " n *c"]], float]


class Split(NamedTuple):
    """Features and targets of the same examples; `logistic.fit` describes the targets."""

    features: Float[np.ndarray, "n d"]
    targets: Shaped[np.ndarray, " n *c"]


class Point(NamedTuple):
    """One penalty that was tried.

    Attributes:
      l2: the penalty.
      score: score on the validation set.
      iterations: iterations of the fit.
      converged: whether the fit converged.
    """

    l2: float
    score: float
    iterations: int
    converged: bool


class Choice(NamedTuple):
    """The outcome of a search.

    Attributes:
      best: point with the highest score.
      points: all points, by penalty.
      fitted: regression with the best penalty, fitted to the training set.
    """

    best: Point
    points: tuple[Point, ...]
    fitted: logistic.Fitted

    @property
    def unconverged(self) -> int:
        """The number of fits that have not converged."""
        return sum(not point.converged for point in self.points)


class Probe(NamedTuple):
    """A linear probe's result.

    Attributes:
      l2: chosen penalty.
      points: all points of the search, by penalty.
      score: test score of the final fit, to training and validation set together.
      test_scores: decision values of the final fit on the test set.
      fitted: final fit.
    """

    l2: float
    points: tuple[Point, ...]
    score: float
    test_scores: Float[np.ndarray, "n c"]
    fitted: logistic.Fitted

    @property
    def unconverged(self) -> int:
        """The number of fits that have not converged, the final one included."""
        return sum(not point.converged for point in self.points) + int(
            (~self.fitted.converged).sum()
        )


def probe(
    train: Split,
    validation: Split | None,
    test: Split,
    metric: Metric,
    classes: int,
    mesh: Mesh,
    seed: int = 0,
) -> Probe:
    """Chooses a penalty, fits again to training and validation set, and scores on the test set.

    Args:
      train, test: examples.
      validation: examples for the choice; None: a fifth of the training set (`hold_out`).
      metric: higher is better.
      classes: number of classes, c.
      mesh: devices to split the examples over.
      seed: seed of the held-out fifth.

    Raises:
      UserError: `logistic.fit` raises it.
    """
    logistic.check_targets(train.targets, len(train.features), classes)
    if validation is None:
        both = train
        train, validation = hold_out(train, seed)
    else:
        both = Split(*(np.concatenate(parts) for parts in zip(train, validation)))
    # Padded to one size, the search and the final fit share a program.
    choice = choose(train, validation, metric, classes, mesh, rows=len(both.features))
    l2, start = choice.best.l2, choice.fitted[:2]
    placed = logistic.place(both.features, mesh)
    fitted = logistic.fit_placed(
        placed, both.targets, [l2], classes, mesh, start=start, at_once=_AT_ONCE
    )
    test_scores = logistic.scores(fitted, test.features, mesh)[0]
    score = metric(test_scores, test.targets)
    return Probe(l2, choice.points, score, test_scores, fitted)


def choose(
    train: Split, validation: Split, metric: Metric, classes: int, mesh: Mesh, rows: int = 0
) -> Choice:
    """Chooses a penalty: fits to the training set, scores on the validation set.

    Args:
      train, validation: examples.
      metric: higher is better.
      classes: number of classes, c.
      mesh: devices to split the examples over.
      rows: least size to pad the training set to, for several sets to share compiled programs.

    Raises:
      UserError: `logistic.fit` raises it.
    """
    placed = logistic.place(train.features, mesh, rows)
    points: dict[int, Point] = {}
    fits: dict[int, logistic.Fitted] = {}

    def scores_at(exponents: list[int]) -> list[float]:
        penalties = [10 ** (exponent / STEPS) for exponent in exponents]
        start = _between(fits, exponents) if fits else None
        fitted = logistic.fit_placed(
            placed, train.targets, penalties, classes, mesh, start=start, at_once=_AT_ONCE
        )
        found = logistic.scores(fitted, validation.features, mesh)
        for i, exponent in enumerate(exponents):
            fits[exponent] = logistic.Fitted(*(part[i : i + 1] for part in fitted))
            points[exponent] = Point(
                l2=penalties[i],
                score=metric(found[i], validation.targets),
                iterations=int(fitted.iterations[i]),
                converged=bool(fitted.converged[i]),
            )
        return [points[exponent].score for exponent in exponents]

    best = search(scores_at)
    return Choice(points[best], tuple(points[exponent] for exponent in sorted(points)), fits[best])


def search(scores_at: Callable[[list[int]], list[float]]) -> int:
    """Searches for the best penalty, 10 ** (exponent / STEPS).

    Args:
      scores_at: returns the scores at some exponents; called with new ones each time.

    Returns:
      The exponent with the highest score; of equal scores the largest exponent.
    """
    exponents, step, scores = list(range(-_EDGE, _EDGE + 1, _COARSE)), _COARSE, {}
    while True:
        scores |= zip(exponents, scores_at(exponents))
        best = max(scores, key=lambda exponent: (scores[exponent], exponent))
        if step == 1:
            return best
        step //= 2
        exponents = [each for each in (best - step, best + step) if abs(each) <= _EDGE]


def _between(fits: dict[int, logistic.Fitted], exponents: list[int]) -> logistic.Start:
    """Averages the fits on either side of each exponent, as starting points.

    The optimum moves smoothly with the logarithm of the penalty. The averages save a third to three
    quarters of the iterations of a start from either of the two.
    """
    below = [fits[max(at for at in fits if at < exponent)] for exponent in exponents]
    above = [fits[min(at for at in fits if at > exponent)] for exponent in exponents]
    weights = [(a.weights + b.weights) / 2 for a, b in zip(below, above)]
    bias = [(a.bias + b.bias) / 2 for a, b in zip(below, above)]
    return np.concatenate(weights), np.concatenate(bias)


def warning(unconverged: int) -> str:
    """Returns a sentence about the fits that have not converged; "" where all have."""
    if not unconverged:
        return ""
    fits = "1 fit has" if unconverged == 1 else f"{unconverged} fits have"
    return (
        f"{fits} not converged: float32 or {logistic.MAX_ITER:,} iterations did not suffice for "
        "a penalty this weak, or for features of such different scales."
    )


def hold_out(examples: Split, seed: int) -> tuple[Split, Split]:
    """Splits examples into a training set and a fifth to validate on, drawn by a seed.

    The fifth is taken of each class, rounded down but at least one; a class with a single example
    keeps it for training. Where examples have several labels, it is taken of all together.
    """
    rng = np.random.default_rng(seed)
    targets = examples.targets
    groups = np.zeros(len(targets), int) if targets.ndim == 2 else targets
    held = np.zeros(len(targets), bool)
    for group in np.unique(groups):
        members = rng.permutation(np.flatnonzero(groups == group))
        held[members[: max(1, len(members) // 5) if len(members) > 1 else 0]] = True
    rest, fifth = (Split(*(part[rows] for part in examples)) for rows in (~held, held))
    return rest, fifth
