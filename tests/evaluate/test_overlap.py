"""The overlap table against loops and scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from clip_jax.errors import UserError
from clip_jax.evaluate.measures import overlap


def case(seed: int, n: int = 300):
    """Makes examples that are right more often near the training data."""
    rng = np.random.default_rng(seed)
    similarity = rng.beta(2, 5, n).round(2)
    return rng.random(n) < 0.5 + 0.4 * similarity, similarity


def test_row_equals_loops():
    for seed in range(20):
        correct, similarity = case(seed)
        found = overlap.analyse(correct, similarity, 0.4)
        near = [bool(c) for c, s in zip(correct, similarity) if s >= 0.4]
        far = [bool(c) for c, s in zip(correct, similarity) if s < 0.4]
        assert found.fraction == len(near) / 300
        parts = ((found.all, near + far), (found.overlap, near), (found.clean, far))
        for part, rows in parts:
            assert (part.successes, part.trials) == (sum(rows), len(rows))
            assert part.value == pytest.approx(sum(rows) / len(rows), abs=1e-12)
            ends = stats.binomtest(sum(rows), len(rows)).proportion_ci(0.995, "exact")
            np.testing.assert_allclose((part.low, part.high), ends, rtol=0, atol=1e-9)
        clean = sum(far) / len(far)
        assert found.inflation == pytest.approx(sum(near + far) / 300 - clean, abs=1e-12)
        test = stats.binomtest(sum(near), len(near), clean, alternative="greater")
        assert found.p_value == pytest.approx(test.pvalue, rel=1e-9)


def test_row_by_hand():
    correct = np.array([1, 1, 1, 0, 1, 0, 0, 1], bool)
    similarity = np.array([0.9, 0.8, 0.8, 0.1, 0.2, 0.3, 0.1, 0.0])
    found = overlap.analyse(correct, similarity, 0.8)  # three at it or above, all right
    assert (found.fraction, found.overlap.value, found.clean.value) == (3 / 8, 1, 2 / 5)
    assert found.all.value - found.clean.value == found.inflation == pytest.approx(0.225)
    assert found.p_value == pytest.approx(0.4**3)


def test_parts_that_are_empty():
    correct, similarity = case(0)
    none, everything = overlap.sweep(correct, similarity, [2.0, -1.0])
    assert (none.fraction, everything.fraction) == (0, 1)
    assert none.inflation == 0
    assert math.isnan(everything.inflation)
    assert math.isnan(none.overlap.value)
    assert math.isnan(everything.clean.value)
    assert math.isnan(none.p_value)
    assert math.isnan(everything.p_value)


def test_sweep():
    correct, similarity = case(1)
    thresholds = np.linspace(0, 1, 11)
    found = overlap.sweep(correct, similarity, thresholds)
    assert [row.threshold for row in found] == thresholds.tolist()
    assert found[4] == overlap.analyse(correct, similarity, thresholds[4])
    fractions = [row.fraction for row in found]
    assert fractions == sorted(fractions, reverse=True)
    assert len(set(fractions)) > 5


def test_significance_is_corrected_for_the_number_of_sets():
    def row(p_value: float) -> overlap.Overlap:
        base = overlap.analyse(np.ones(2, bool), np.array([0.0, 1.0]), 0.5)
        return overlap.Overlap(**{**vars(base), "p_value": p_value})

    found = {"a": row(0.001), "b": row(0.02), "c": row(0.6), "untested": row(math.nan)}
    assert overlap.significant(found) == ["a"]
    assert overlap.significant(found, 0.07) == ["a", "b"]  # 0.07 / 3 = 0.0233
    assert overlap.significant({}) == []


def test_data_that_cannot_be_analysed():
    with pytest.raises(UserError, match="without examples"):
        overlap.analyse(np.zeros(0, bool), np.zeros(0), 0.5)
    with pytest.raises(UserError, match="1 of 3 similarities"):
        overlap.analyse(np.ones(3, bool), np.array([0.1, math.nan, 0.2]), 0.5)
