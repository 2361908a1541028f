"""Robustness against scipy and constructed data."""

import math

import numpy as np
import pytest
from scipy import special, stats

from clip_jax.errors import UserError
from clip_jax.evaluate.measures import robustness


def test_trend_finds_the_line_that_the_models_were_made_by():
    reference = np.linspace(0.4, 0.9, 12)
    shifted = special.expit(-0.7 + 1.3 * special.logit(reference))
    trend = robustness.fit(reference, shifted)
    assert trend.line.slope == pytest.approx(1.3, abs=1e-9)
    assert trend.line.intercept == pytest.approx(-0.7, abs=1e-9)
    np.testing.assert_allclose(trend.line.slope_interval, 1.3, atol=1e-6)
    np.testing.assert_allclose(trend.predict(reference), shifted, atol=1e-9)
    # A model ten points above the line, and one on it.
    above = robustness.effective(trend, reference[[3, 4]], shifted[[3, 4]] + [0.1, 0])
    np.testing.assert_allclose(above, [0.1, 0], atol=1e-9)
    np.testing.assert_allclose(
        robustness.relative(np.array([0.7, 0.5]), np.array([0.6, 0.6])), [0.1, -0.1]
    )


def test_trend_equals_scipys_line_in_log_odds():
    rng = np.random.default_rng(1)
    reference, shifted = rng.uniform(0.05, 0.95, (2, 204))
    trend = robustness.fit(reference, shifted, 0.99)
    x, y = np.log(reference / (1 - reference)), np.log(shifted / (1 - shifted))
    wanted = stats.linregress(x, y)
    assert trend.line.slope == pytest.approx(wanted.slope, abs=1e-9)
    half = stats.t.ppf(0.995, 202) * wanted.stderr
    assert trend.line.slope_interval[1] - trend.line.slope == pytest.approx(half, abs=1e-9)
    value = 1 / (1 + math.exp(-wanted.intercept - wanted.slope * math.log(0.8 / 0.2)))
    assert trend.predict(0.8) == pytest.approx(value, abs=1e-9)


def test_accuracies_of_none_and_all():
    reference, shifted = np.array([0, 0.5, 0.7, 0.9, 1]), np.array([0.1, 0.3, 0, 0.8, 1])
    trend = robustness.fit(reference, shifted)
    assert trend.ignored == 3
    assert trend.line.points == 2
    np.testing.assert_array_equal(trend.predict(np.array([0, 1])), [0, 1])
    flat = robustness.fit(np.array([0.2, 0.6]), np.array([0.5, 0.5]))
    np.testing.assert_allclose(flat.predict(np.array([0, 0.3, 1])), 0.5)
    with pytest.raises(UserError, match="there is only 1"):
        robustness.fit(np.array([0.5, 1]), np.array([0.5, 0.9]))


def test_restricting_to_the_classes_of_a_shift():
    rng = np.random.default_rng(2)
    scores = rng.normal(size=(40, 9)).astype(np.float32)
    classes = [4, (0, 7, 2), [8]]
    found = robustness.restrict(scores, classes)
    for row, short in zip(scores, found):
        assert short.tolist() == [row[4], max(row[0], row[7], row[2]), row[8]]
    # Class 5 wins over all, and must not count.
    scores[:, 5] = 100
    assert set(robustness.restrict(scores, [4, 8]).argmax(axis=1)) == {0, 1}
    scores[3, 7] = np.nan
    assert np.isnan(robustness.restrict(scores, classes)[3, 1])


@pytest.mark.parametrize(
    ("classes", "message"),
    [([1, 9], "1 to 9.*0 to 8"), ([1, (2, 1)], "twice"), ([], "without"), ([1, ()], "without")],
)
def test_classes_that_a_shift_cannot_have(classes, message):
    with pytest.raises(UserError, match=message):
        robustness.restrict(np.zeros((2, 9)), classes)
