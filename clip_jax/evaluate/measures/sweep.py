"""The linear probe's L2 strength, found on a validation set from coarse to fine (paper, A.3).

Strengths lie between 1e-6 and 1e6, eight to the decade: 96 steps, 97 values. Every 16th is tried,
two decades apart; then the interval around the best is halved until its neighbours have been
tried. That is 15 fits, or fewer at an edge of the range. Of strengths that score the same the
strongest is taken: the simpler classifier, and the one whose fit is the better determined.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from clip_jax.evaluate.measures import logistic

STEPS = 8  # per decade
_EDGE = 6 * STEPS  # strengths are 10 ** (place / STEPS), places from -_EDGE to _EDGE
_COARSE = 2 * STEPS  # places between the first strengths
_AT_ONCE = 2  # as many as a round asks for; the first round's neighbours take similar iterations

Metric = Callable[[np.ndarray, np.ndarray], float]  # of decision values [n, c] and targets


class Split(NamedTuple):
    """Features float [n, d] and targets int [n] or [n, c] (`logistic`), of the same examples."""

    features: np.ndarray
    targets: np.ndarray


class Point(NamedTuple):
    """One strength tried: its score on the validation set, and how the fit went."""

    strength: float
    score: float
    iterations: int
    converged: bool


class Choice(NamedTuple):
    """The best point, all of them by strength, and the regression fitted to the training set."""

    best: Point
    points: tuple[Point, ...]
    fitted: logistic.Fitted


class Probe(NamedTuple):
    """A linear probe's result.

    Attributes:
      strength: chosen.
      points: of the sweep, by strength.
      score: on the test set, fitted to training and validation set together.
      test_scores: decision values of that fit, float32 [n, c].
      fitted: that fit.
    """

    strength: float
    points: tuple[Point, ...]
    score: float
    test_scores: np.ndarray
    fitted: logistic.Fitted


def probe(
    train: Split,
    validation: Split | None,
    test: Split,
    metric: Metric,
    classes: int,
    mesh: Mesh,
    seed: int = 0,
) -> Probe:
    """Chooses a strength, fits again to training and validation set, and scores on the test set.

    Args:
      train, test: examples.
      validation: None: a fifth of the training set is held out for the choice (`hold_out`).
      metric: whose highest score is best.
      classes: c.
      mesh: devices that examples are split over.
      seed: of what is held out.

    Raises:
      UserError: as of `logistic.fit`.
    """
    logistic.check_targets(train.targets, len(train.features), classes)
    if validation is None:
        both = train
        train, validation = hold_out(train, seed)
    else:
        both = Split(*(np.concatenate(parts) for parts in zip(train, validation)))
    # Padded alike, both share a program.
    choice = choose(train, validation, metric, classes, mesh, rows=len(both.features))
    strength, start = choice.best.strength, choice.fitted[:2]
    placed = logistic.place(both.features, mesh)
    fitted = logistic.fit_placed(
        placed, both.targets, [strength], classes, mesh, start=start, at_once=_AT_ONCE
    )
    test_scores = logistic.scores(fitted, test.features, mesh)[0]
    score = metric(test_scores, test.targets)
    return Probe(strength, choice.points, score, test_scores, fitted)


def choose(
    train: Split, validation: Split, metric: Metric, classes: int, mesh: Mesh, rows: int = 0
) -> Choice:
    """Fits to the training set, coarse to fine, and scores on the validation set.

    Args:
      train, validation: examples.
      metric: whose highest score is best.
      classes: c.
      mesh: devices that examples are split over.
      rows: to pad the training set to at least, so that several sets share compiled programs.

    Raises:
      UserError: as of `logistic.fit`.
    """
    placed = logistic.place(train.features, mesh, rows)
    points: dict[int, Point] = {}
    fits: dict[int, logistic.Fitted] = {}

    def scores_at(places: list[int]) -> list[float]:
        strengths = [10 ** (place / STEPS) for place in places]
        start = _between(fits, places) if fits else None
        fitted = logistic.fit_placed(
            placed, train.targets, strengths, classes, mesh, start=start, at_once=_AT_ONCE
        )
        found = logistic.scores(fitted, validation.features, mesh)
        for number, place in enumerate(places):
            fits[place] = logistic.Fitted(*(part[number : number + 1] for part in fitted))
            score = metric(found[number], validation.targets)
            went = int(fitted.iterations[number]), bool(fitted.converged[number])
            points[place] = Point(strengths[number], score, *went)
        return [points[place].score for place in places]

    best = search(scores_at)
    return Choice(points[best], tuple(points[place] for place in sorted(points)), fits[best])


def search(scores_at: Callable[[list[int]], list[float]]) -> int:
    """The place of the best strength, 10 ** (place / STEPS), by scores at places asked for."""
    places, step, scores = list(range(-_EDGE, _EDGE + 1, _COARSE)), _COARSE, {}
    while True:
        scores |= zip(places, scores_at(places))
        best = max(scores, key=lambda place: (scores[place], place))
        if step == 1:
            return best
        step //= 2
        places = [place for place in (best - step, best + step) if abs(place) <= _EDGE]


def _between(fits: dict[int, logistic.Fitted], places: list[int]) -> logistic.Start:
    """Means of the fits on either side: the optimum moves smoothly with the strength's logarithm.

    They start nearer than either of the two, by a third to three quarters of the iterations.
    """
    weaker = [fits[max(at for at in fits if at < place)] for place in places]
    stronger = [fits[min(at for at in fits if at > place)] for place in places]
    weights = [(a.weights + b.weights) / 2 for a, b in zip(weaker, stronger)]
    bias = [(a.bias + b.bias) / 2 for a, b in zip(weaker, stronger)]
    return np.concatenate(weights), np.concatenate(bias)


def hold_out(examples: Split, seed: int) -> tuple[Split, Split]:
    """A training set, and a fifth of the examples to validate on, drawn by the seed.

    The fifth is of each class, rounded down but at least one; a class with a single example keeps
    it for training. Where examples have several labels, it is of all of them together.
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
