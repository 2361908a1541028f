"""Intervals and tests of proportions against their definitions."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import special, stats

from clip_jax.evaluate.measures import intervals

CASES = [(0, 1), (1, 1), (0, 20), (20, 20), (7, 7), (342, 360), (4_999, 10_000), (1, 50_000)]


def cases(count: int = 50) -> list[tuple[int, int]]:
    rng = np.random.default_rng(0)
    trials = rng.integers(1, 400, count)
    return CASES + [(int(rng.integers(0, n + 1)), int(n)) for n in trials]


def at_least(successes: int, trials: int, p: float) -> Fraction:
    """Sums the probabilities of so many successes or more, exactly."""
    p = Fraction(p)
    return sum(
        (math.comb(trials, k) * p**k * (1 - p) ** (trials - k))
        for k in range(successes, trials + 1)
    )


@pytest.mark.parametrize("confidence", [0.95, 0.995])
def test_clopper_pearson_equals_scipy(confidence):
    for successes, trials in cases():
        wanted = stats.binomtest(successes, trials).proportion_ci(confidence, "exact")
        found = intervals.clopper_pearson(successes, trials, confidence)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9)


def test_clopper_pearson_ends_where_the_data_are_just_not_refuted():
    for successes, trials in ((3, 9), (1, 12), (11, 12), (30, 40)):
        low, high = intervals.clopper_pearson(successes, trials)  # the paper's: 99.5 %
        assert float(at_least(successes, trials, low)) == pytest.approx(0.0025, rel=1e-6)
        at_most = 1 - at_least(successes + 1, trials, high)
        assert float(at_most) == pytest.approx(0.0025, rel=1e-6)


@pytest.mark.parametrize(("confidence", "errors"), [(0.95, 1.959964), (0.995, 2.807034)])
def test_wilson_ends_where_the_proportion_is_so_many_standard_errors_away(confidence, errors):
    for successes, trials in cases():
        low, high = intervals.wilson(successes, trials, confidence)
        assert low <= successes / trials <= high
        for end in (low, high):
            error = errors * math.sqrt(max(end * (1 - end), 0) / trials)
            assert abs(end - successes / trials) == pytest.approx(error, abs=1e-7)


def test_binomial_greater():
    rng = np.random.default_rng(1)
    for successes, trials in cases():
        p = float(rng.random())
        # The regularised incomplete beta function is the tail of the binomial.
        wanted = special.betainc(successes, trials - successes + 1, p) if successes else 1
        found = intervals.binomial_greater(successes, trials, p)
        assert found == pytest.approx(wanted, rel=1e-6, abs=1e-300)
    for successes, trials, p in ((9, 12, 0.5), (3, 30, 0.01), (25, 25, 0.75)):
        wanted = float(at_least(successes, trials, p))
        assert intervals.binomial_greater(successes, trials, p) == pytest.approx(wanted, rel=1e-9)
    assert intervals.binomial_greater(4, 5, 1.0) == 1
    assert intervals.binomial_greater(1, 5, 0.0) == 0


def test_without_trials():
    assert intervals.clopper_pearson(0, 0) == intervals.wilson(0, 0, 0.95) == (0, 1)
    assert intervals.binomial_greater(0, 0, 0.3) == 1
    nothing = intervals.proportion(0, 0)
    assert math.isnan(nothing.value)
    assert (nothing.low, nothing.high) == (0, 1)


def test_proportion():
    found = intervals.proportion(3, 12, 0.9)
    assert (found.successes, found.trials, found.value) == (3, 12, 0.25)
    assert (found.low, found.high) == intervals.clopper_pearson(3, 12, 0.9)
    assert found.low < 0.25 < found.high


def test_more_successes_than_trials():
    for function in (intervals.clopper_pearson, intervals.wilson, intervals.binomial_greater):
        for successes, trials in ((5, 4), (-1, 4)):
            with pytest.raises(ValueError, match=f"{successes} successes of 4"):
                function(successes, trials, 0.5)


def test_bonferroni():
    """35 data sets at 5 % together: the paper's 1.4e-3 each."""
    assert intervals.bonferroni(0.05, 35) == pytest.approx(1.43e-3, abs=1e-5)
    assert intervals.bonferroni(0.05, 0) == 0.05
