"""Lines, robustness and scaling against scipy and constructed data."""

import math

import numpy as np
import pytest
from scipy import special, stats

from clip_jax.errors import UserError
from clip_jax.evaluate.measures import lines, robustness, scaling

# Lines


def test_line_equals_scipys():
    rng = np.random.default_rng(0)
    for _ in range(30):
        n = int(rng.integers(3, 40))
        x = rng.normal(3, 2, n)
        y = rng.normal() + rng.normal() * x + rng.normal(0, 0.5, n)
        found, wanted = lines.fit(x, y, 0.9), stats.linregress(x, y)
        assert found.points == n
        assert found.slope == pytest.approx(wanted.slope, abs=1e-9)
        assert found.intercept == pytest.approx(wanted.intercept, abs=1e-9)
        assert found.r2 == pytest.approx(wanted.rvalue**2, abs=1e-9)
        residuals = y - wanted.intercept - wanted.slope * x
        assert found.deviation == pytest.approx(math.sqrt(sum(residuals**2) / (n - 2)), abs=1e-9)
        times = stats.t.ppf(0.95, n - 2)
        for interval, centre, error in (
            (found.slope_interval, wanted.slope, wanted.stderr),
            (found.intercept_interval, wanted.intercept, wanted.intercept_stderr),
        ):
            ends = [centre - times * error, centre + times * error]
            np.testing.assert_allclose(interval, ends, rtol=1e-9, atol=1e-9)


def test_line_through_two_points():
    found = lines.fit([1, 3], [2, 8])
    assert (found.slope, found.intercept, found.r2) == pytest.approx((3, -1, 1))
    assert np.isnan([found.deviation, *found.slope_interval, *found.intercept_interval]).all()


def test_line_that_cannot_be():
    for x in ([], [1], [2, 2, 2]):
        with pytest.raises(UserError, match="two points"):
            lines.fit(x, np.zeros(len(x)))
    assert math.isnan(lines.fit([1, 2, 3], [5, 5, 5]).r2)


# Robustness


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
    np.testing.assert_allclose(robustness.relative([0.7, 0.5], [0.6, 0.6]), [0.1, -0.1])


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
    assert trend.left_out == 3
    assert trend.line.points == 2
    np.testing.assert_array_equal(trend.predict([0, 1]), [0, 1])
    flat = robustness.fit([0.2, 0.6], [0.5, 0.5])
    np.testing.assert_allclose(flat.predict([0, 0.3, 1]), 0.5)
    with pytest.raises(UserError, match="there is only 1"):
        robustness.fit([0.5, 1], [0.5, 0.9])


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


# Scaling


def test_power_law_finds_what_the_errors_were_made_by():
    compute = np.array([6.1, 9.9, 21.5, 75.3, 265.9])  # a ratio of 44
    law = scaling.fit(compute, 0.9 * compute**-0.11)
    assert law.exponent == pytest.approx(-0.11, abs=1e-9)
    assert law.constant == pytest.approx(0.9, abs=1e-9)
    np.testing.assert_allclose(law.exponent_interval, -0.11, atol=1e-6)
    assert law.deviation == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(law.predict(compute), 0.9 * compute**-0.11)


def test_power_law_equals_scipys_line_of_logarithms():
    rng = np.random.default_rng(3)
    compute, error = 10 ** rng.uniform(0, 4, 8), rng.uniform(0.1, 0.9, 8)
    law, wanted = scaling.fit(compute, error), stats.linregress(np.log(compute), np.log(error))
    assert law.exponent == pytest.approx(wanted.slope, abs=1e-9)
    assert law.constant == pytest.approx(math.exp(wanted.intercept), abs=1e-9)
    assert law.r2 == pytest.approx(wanted.rvalue**2, abs=1e-9)
    half = stats.t.ppf(0.975, 6) * wanted.stderr
    np.testing.assert_allclose(
        law.exponent_interval, (wanted.slope - half, wanted.slope + half), atol=1e-9
    )
    residuals = np.log(error) - wanted.intercept - wanted.slope * np.log(compute)
    assert law.deviation == pytest.approx(math.sqrt(sum(residuals**2) / 6), abs=1e-9)


def test_power_law_of_few_points():
    law = scaling.fit([1, 10, 100], [0.5, 0, 0.05])
    assert (law.points, law.left_out) == (2, 1)
    assert law.exponent == pytest.approx(-0.5)
    assert np.isnan([law.deviation, *law.exponent_interval]).all()
    with pytest.raises(UserError, match="two points"):
        scaling.fit([1, 10], [0.5, 0])
