"""Metrics and their intervals against scikit-learn, loops and numbers worked by hand."""

import warnings
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from clip_jax.errors import UserError
from clip_jax.evaluate.measures.metrics import METRICS, correct

NAMES = {"accuracy", "mean_per_class", "map_11_point", "roc_auc", "mean_top1_top5"}


def case(seed: int, classes: int | None = None):
    """Scores without ties and targets: some hundred examples, of which classes may have none."""
    rng = np.random.default_rng(seed)
    n, c = int(rng.integers(20, 300)), classes or int(rng.integers(6, 30))
    targets = rng.integers(0, c, n)
    scores = rng.normal(size=(n, c)).astype(np.float32)
    scores[np.arange(n), targets] += 1
    return scores, targets


def multi_label_case(seed: int, *, tied: bool = True):
    """Scores with many ties, targets of which some are to be ignored: int8 in {-1, 0, 1}."""
    rng = np.random.default_rng(seed)
    targets = rng.choice([-1, 0, 1], (int(rng.integers(20, 200)), 5), p=[0.1, 0.7, 0.2])
    scores = rng.normal(size=targets.shape) + targets
    return (scores.round(1) if tied else scores), targets.astype(np.int8)


def eleven_points(scores, targets) -> Fraction:
    """VOC2007's average precision of one class, by its definition and without rounding."""
    points = []
    for threshold in set(scores.tolist()):
        shown = [t for s, t in zip(scores, targets) if s >= threshold and t != -1]
        if shown:
            points.append((shown.count(1), Fraction(shown.count(1), len(shown))))
    positives = targets.tolist().count(1)
    return sum(
        max(precision for found, precision in points if 10 * found >= level * positives)
        for level in range(11)
    ) / Fraction(11)


def mean_average_precision(scores, targets) -> float:
    there = [c for c in range(scores.shape[1]) if 1 in targets[:, c]]
    return float(np.mean([float(eleven_points(scores[:, c], targets[:, c])) for c in there]))


def top_k(scores, targets, k: int) -> float:
    labels = np.arange(scores.shape[1])
    return sklearn_metrics.top_k_accuracy_score(targets, scores, k=k, labels=labels)


def per_class(scores, targets) -> float:
    with warnings.catch_warnings():  # of classes that are predicted and have no example
        warnings.simplefilter("ignore")
        return sklearn_metrics.balanced_accuracy_score(targets, scores.argmax(axis=1))


INDEPENDENT = {
    "accuracy": lambda s, t: sklearn_metrics.accuracy_score(t, s.argmax(axis=1)),
    "mean_per_class": per_class,
    "mean_top1_top5": lambda s, t: (top_k(s, t, 1) + top_k(s, t, 5)) / 2,
    "roc_auc": lambda s, t: sklearn_metrics.roc_auc_score(t, s[:, 1] - s[:, 0]),
    "map_11_point": mean_average_precision,
}


def example_of(name: str, seed: int):
    if name == "map_11_point":
        return multi_label_case(seed)
    if name == "roc_auc":
        scores, targets = case(seed, classes=2)
        return np.round(4 * scores) / 4, targets  # whose differences are exact, and often tie
    return case(seed)


def test_names():
    assert set(METRICS) == set(INDEPENDENT) == NAMES
    assert [name for name, metric in METRICS.items() if metric.multi_label] == ["map_11_point"]
    assert [name for name, metric in METRICS.items() if metric.is_proportion] == ["accuracy"]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_metric_equals_an_independent_one(name):
    found = []
    for seed in range(30):
        scores, targets = example_of(name, seed)
        found.append(METRICS[name](scores, targets))
        assert found[-1] == pytest.approx(INDEPENDENT[name](scores, targets), abs=1e-9), seed
    assert 0.2 < np.mean(found) < 0.95


@pytest.mark.parametrize("name", sorted(NAMES - {"accuracy"}))
def test_interval_is_that_of_explicit_resamples(name):
    """The independent metric of each resample, made into a data set of its own, agrees."""
    scores, targets = example_of(name, 7)
    rng, n, found = np.random.default_rng(0), len(scores), []
    for _ in range(60):
        drawn = rng.integers(n, size=n)
        found.append(INDEPENDENT[name](scores[drawn], targets[drawn]))
    wanted = np.quantile(found, [0.05, 0.95])
    actual = METRICS[name].interval(scores, targets, confidence=0.9, resamples=60)
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-9)
    assert actual[0] < METRICS[name](scores, targets) < actual[1]


def test_interval_of_accuracy_is_exact():
    for seed in range(10):
        scores, targets = case(seed)
        hits = int(np.sum(scores.argmax(axis=1) == targets))
        wanted = stats.binomtest(hits, len(targets)).proportion_ci(0.995, "exact")
        found = METRICS["accuracy"].interval(scores, targets)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_interval_contains_the_truth_as_often_as_it_says(name):
    """The interval covers the truth for most of 60 data sets drawn from one distribution."""
    scores, targets = (np.concatenate([part] * 8) for part in example_of(name, 3))
    truth, rng, inside = METRICS[name](scores, targets), np.random.default_rng(5), 0
    for _ in range(60):
        drawn = rng.choice(len(scores), 400)
        low, high = METRICS[name].interval(scores[drawn], targets[drawn], 0.9, resamples=100)
        inside += low <= truth <= high
    assert inside >= 44  # 54 expected; 44 or fewer once in 4,000


def test_map_of_scikit_learns_curve():
    """Without ties, from its precision and recall."""
    for seed in range(20):
        scores, targets = multi_label_case(seed, tied=False)
        found = []
        for column, labels in zip(scores.T, targets.T):
            counted = labels != -1
            precision, recall, _ = sklearn_metrics.precision_recall_curve(
                labels[counted], column[counted]
            )
            levels = np.arange(11) / 10 - 1e-9
            found.append(np.mean([precision[:-1][recall[:-1] >= t].max() for t in levels]))
        assert METRICS["map_11_point"](scores, targets) == pytest.approx(np.mean(found), abs=1e-9)


def test_map_by_hand():
    scores = np.array([[0.9], [0.8], [0.7], [0.6], [0.5]])
    targets = np.array([[True], [False], [True], [False], [False]])
    # Precision 1 up to recall 1/2 (6 points), 2/3 up to recall 1 (5 points).
    wanted = (6 * 1 + 5 * 2 / 3) / 11
    assert METRICS["map_11_point"](scores, targets) == pytest.approx(wanted)
    ignored = targets.astype(np.int8)
    ignored[1] = -1
    assert METRICS["map_11_point"](scores, ignored) == 1
    # A class without a positive is left out.
    two = np.concatenate([targets, np.zeros_like(targets)], axis=1)
    assert METRICS["map_11_point"](np.tile(scores, 2), two) == pytest.approx(wanted)


def test_ties_count_against_the_model():
    scores = np.array([[1, 1, 0], [0, 2, 2], [5, 5, 5], [0, 0, 1]], np.float32)
    targets = np.array([0, 2, 1, 2])
    assert correct(scores, targets).tolist() == [False, False, False, True]
    assert correct(scores, targets, k=2).tolist() == [True, True, False, True]
    assert METRICS["accuracy"](scores, targets) == 0.25
    assert METRICS["mean_per_class"](scores, targets) == pytest.approx(0.5 / 3)
    assert METRICS["roc_auc"](np.zeros((6, 2)), np.array([0, 1] * 3)) == 0.5
    tied = METRICS["map_11_point"](np.zeros((8, 1)), np.array([[True], [False]] * 4))
    assert tied == 0.5  # the fraction of positives


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_broken_model_reaches_nothing(value):
    n, c = 12, 7
    scores, targets = np.full((n, c), value, np.float32), np.arange(n) % c
    for name in ("accuracy", "mean_per_class", "mean_top1_top5"):
        assert METRICS[name](scores, targets) == 0
        low, high = METRICS[name].interval(scores, targets)
        assert low == 0
        assert high < 0.5
    assert METRICS["roc_auc"](scores[:, :2], targets % 2) == 0
    found = METRICS["map_11_point"](np.full((n, 1), value), np.arange(n)[:, None] < 3)
    # At best the fraction of positives; where all is NaN each positive comes after all negatives.
    assert found == pytest.approx(3 / 12)


def test_a_score_that_is_not_a_number_is_wrong():
    scores = np.array([[np.nan, 0, 1], [np.nan, 2, 1], [0, 1, 3]], np.float32)
    assert correct(scores, np.array([0, 1, 2])).tolist() == [False, False, True]
    assert correct(scores, np.array([0, 1, 2]), k=5).tolist() == [False, True, True]
    margins = np.array([0.1, np.nan, 0.9, np.nan])
    scores = np.stack([np.zeros(4), margins], axis=1)
    # Positives 0.9 and NaN, negatives 0.1 and NaN: only (0.9, 0.1) is in order.
    assert METRICS["roc_auc"](scores, np.array([0, 0, 1, 1])) == 0.25
    found = METRICS["map_11_point"](margins[:, None], np.array([[0], [0], [1], [1]]))
    # Order: NaN negative, 0.9 positive, 0.1 negative, NaN positive: 1/2 at both recalls.
    assert found == pytest.approx(0.5)


def test_resamples_without_a_class_are_left_out():
    scores = np.array([[0.0, 1], [0, -1], [0, 2]])
    low, high = METRICS["roc_auc"].interval(scores, np.array([1, 0, 1]))
    assert low == high == 1


@pytest.mark.parametrize(
    ("name", "scores", "targets", "message"),
    [
        ("accuracy", np.zeros((0, 3)), np.zeros(0, int), "at least one example"),
        ("accuracy", np.zeros((4, 3)), np.zeros(5, int), r"scores \[4, 3\].*numbers \[5\]"),
        ("mean_per_class", np.zeros((2, 3)), np.array([0, 3]), "0 to 3, but.*0 to 2"),
        ("mean_top1_top5", np.zeros((2, 3)), np.array([-1, 1]), "from -1 to 1"),
        ("roc_auc", np.zeros((2, 2)), np.array([1, 1]), "1 have examples"),
        ("roc_auc", np.zeros((2, 3)), np.array([0, 1]), "3 classes"),
        ("map_11_point", np.zeros((2, 3)), np.zeros((2, 2), bool), r"\[2, 3\].*\[2, 2\]"),
        ("map_11_point", np.zeros((2, 3)), np.zeros((2, 3), bool), "at least one entry"),
    ],
)
def test_undefined_metrics(name, scores, targets, message):
    with pytest.raises(UserError, match=message):
        METRICS[name](scores, targets)
