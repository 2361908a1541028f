"""Lines and power laws against the normal equations and constructed data."""

import math

import numpy as np
import pytest
from scipy import special

from clip_jax.errors import UserError
from clip_jax.evaluate.measures import lines


def normal_equations(x, y) -> tuple[np.ndarray, np.ndarray, float]:
    """(intercept, slope), their standard errors, and r2, by the matrix [1, x]."""
    matrix = np.stack([np.ones_like(x), x], axis=1)
    coefficients = np.linalg.lstsq(matrix, y, rcond=None)[0]
    squares = np.sum((y - matrix @ coefficients) ** 2)
    covariance = squares / (len(x) - 2) * np.linalg.inv(matrix.T @ matrix)
    return coefficients, np.sqrt(np.diag(covariance)), 1 - squares / np.sum((y - y.mean()) ** 2)


def test_line_solves_the_normal_equations():
    rng = np.random.default_rng(0)
    for _ in range(30):
        n = int(rng.integers(3, 40))
        x = rng.normal(3, 2, n)
        y = rng.normal() + rng.normal() * x + rng.normal(0, 0.5, n)
        found, (wanted, errors, r2) = lines.fit(x, y, 0.9), normal_equations(x, y)
        assert found.points == n
        assert (found.intercept, found.slope) == pytest.approx(wanted, abs=1e-9)
        assert found.r2 == pytest.approx(r2, abs=1e-9)
        residuals = y - wanted[0] - wanted[1] * x
        assert found.deviation == pytest.approx(math.sqrt(sum(residuals**2) / (n - 2)), abs=1e-9)
        quantile = special.stdtrit(n - 2, 0.95)
        for interval, centre, error in zip(
            (found.intercept_interval, found.slope_interval), wanted, errors, strict=True
        ):
            ends = [centre - quantile * error, centre + quantile * error]
            np.testing.assert_allclose(interval, ends, rtol=1e-9, atol=1e-9)


def test_line_through_two_points():
    found = lines.fit(np.array([1, 3]), np.array([2, 8]))
    assert (found.slope, found.intercept, found.r2) == pytest.approx((3, -1, 1))
    assert np.isnan([found.deviation, *found.slope_interval, *found.intercept_interval]).all()


def test_line_that_cannot_be():
    for x in ([], [1], [2, 2, 2]):
        with pytest.raises(UserError, match="two points"):
            lines.fit(np.array(x, float), np.zeros(len(x)))
    assert math.isnan(lines.fit(np.array([1, 2, 3]), np.array([5, 5, 5])).r2)


def test_power_law_finds_what_the_errors_were_made_by():
    compute = np.array([6.1, 9.9, 21.5, 75.3, 265.9])  # a ratio of 44
    law = lines.fit_power_law(compute, 0.9 * compute**-0.11)
    assert law.exponent == pytest.approx(-0.11, abs=1e-9)
    assert law.constant == pytest.approx(0.9, abs=1e-9)
    np.testing.assert_allclose(law.exponent_interval, -0.11, atol=1e-6)
    assert law.deviation == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(law.predict(compute), 0.9 * compute**-0.11)


def test_power_law_is_the_line_of_logarithms():
    rng = np.random.default_rng(3)
    compute, error = 10 ** rng.uniform(0, 4, 8), rng.uniform(0.1, 0.9, 8)
    law = lines.fit_power_law(compute, error)
    (intercept, slope), errors, r2 = normal_equations(np.log(compute), np.log(error))
    assert law.exponent == pytest.approx(slope, abs=1e-9)
    assert law.constant == pytest.approx(math.exp(intercept), abs=1e-9)
    assert law.r2 == pytest.approx(r2, abs=1e-9)
    half = special.stdtrit(6, 0.975) * errors[1]
    np.testing.assert_allclose(law.exponent_interval, (slope - half, slope + half), atol=1e-9)
    residuals = np.log(error) - intercept - slope * np.log(compute)
    assert law.deviation == pytest.approx(math.sqrt(sum(residuals**2) / 6), abs=1e-9)


def test_power_law_of_few_points():
    law = lines.fit_power_law(np.array([1, 10, 100]), np.array([0.5, 0, 0.05]))
    assert (law.points, law.ignored) == (2, 1)
    assert law.exponent == pytest.approx(-0.5)
    assert np.isnan([law.deviation, *law.exponent_interval]).all()
    with pytest.raises(UserError, match="two points"):
        lines.fit_power_law(np.array([1, 10]), np.array([0.5, 0]))
