"""Power laws of compute: fitted to the best runs, with an interval."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Real
from scipy import optimize, stats

from clip_jax.evaluate.measures import lines

CONFIDENCE = lines.CONFIDENCE
_FEWEST = 3  # points: with two the interval of the exponent is not known
_FEWEST_WITH_FLOOR = 6  # points: with fewer the corrected AIC of four parameters is not defined
_SPAN = 2.0  # least ratio of the largest compute to the smallest


@dataclasses.dataclass(frozen=True)
class Law:
    """value = floor + constant * compute ** -exponent.

    Attributes:
      floor: value that no compute goes below; 0 in a plain power law.
      constant: value above the floor at a compute of 1.
      exponent: positive where more compute helps.
      exponent_interval, floor_interval: confidence intervals from the residuals, by Student's t.
      deviation: standard deviation of the natural logarithm of the values about the law.
      points: number of points.
    """

    floor: float
    constant: float
    exponent: float
    exponent_interval: tuple[float, float]
    floor_interval: tuple[float, float]
    deviation: float
    points: int

    def predict(self, compute: Real[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Returns the values that the law gives."""
        return self.floor + self.constant * np.asarray(compute, np.float64) ** -self.exponent


def frontier(compute: Real[np.ndarray, " n"], value: Real[np.ndarray, " n"]) -> list[int]:
    """Returns the points that no other beats with as much compute or less, by compute."""
    best, found = math.inf, []
    for i in np.lexsort((value, compute)).tolist():
        if value[i] < best:
            best = value[i]
            found.append(i)
    return found


def shortage(compute: Real[np.ndarray, " n"]) -> str:
    """Returns why so few points cannot be fitted; "" where they can."""
    if len(compute) < _FEWEST:
        return f"a law needs {_FEWEST} points, and the best runs are {len(compute)}"
    if (span := max(compute) / min(compute)) < _SPAN:
        return f"the best runs span a factor of {span:.2f} in compute: a law needs {_SPAN:g}"
    return ""


def fit(compute: Real[np.ndarray, " n"], value: Real[np.ndarray, " n"]) -> Law:
    """Fits by least squares of the logarithms.

    The law has a floor where the corrected Akaike criterion (Hurvich & Tsai 1989) prefers one.

    Args:
      compute, value: positive; enough of them (`shortage`).
    """
    compute, value = np.asarray(compute, np.float64), np.asarray(value, np.float64)
    plain = lines.fit_power_law(compute, value)
    low, high = plain.exponent_interval
    without = Law(
        floor=0.0,
        constant=plain.constant,
        exponent=-plain.exponent,
        exponent_interval=(-high, -low),
        floor_interval=(0.0, 0.0),
        deviation=plain.deviation,
        points=plain.points,
    )
    with_floor = _fit_with_floor(compute, value, without)
    if with_floor and _criterion(value, with_floor, compute, 4) < _criterion(
        value, without, compute, 3
    ):
        return with_floor
    return without


def _fit_with_floor(
    compute: Float[np.ndarray, " n"], value: Float[np.ndarray, " n"], start: Law
) -> Law | None:
    """Fits floor, constant and exponent; None: too few points, or no floor is found."""
    n = len(value)
    if n < _FEWEST_WITH_FLOOR:
        return None
    unit = math.exp(np.mean(np.log(compute)))  # so that the constant is a value among those given

    def model(c, floor, constant, exponent):
        return np.log(floor + constant * (c / unit) ** -exponent)

    half = value.min() / 2
    guess = (half, max(np.median(value) - half, half), max(2 * start.exponent, 0.05))
    try:
        found, covariance, *_ = optimize.curve_fit(
            model, compute, np.log(value), guess, bounds=([0, 1e-12, 1e-6], np.inf), max_nfev=10_000
        )
    except RuntimeError:  # it does not converge
        return None
    errors = np.sqrt(np.diag(covariance)) * stats.t.ppf((1 + CONFIDENCE) / 2, n - 3)
    floor, constant, exponent = found.tolist()
    if not np.all(np.isfinite(errors)):
        return None
    residuals = np.log(value) - model(compute, *found)
    return Law(
        floor=floor,
        constant=constant * unit**exponent,
        exponent=exponent,
        exponent_interval=(exponent - errors[2], exponent + errors[2]),
        floor_interval=(max(0.0, floor - errors[0]), floor + errors[0]),
        deviation=math.sqrt(float(np.sum(residuals**2)) / (n - 3)),
        points=n,
    )


def _criterion(
    value: Float[np.ndarray, " n"], law: Law, compute: Float[np.ndarray, " n"], parameters: int
) -> float:
    """Returns the corrected AIC of normal residuals; `parameters` count their variance."""
    n = len(value)
    if n <= parameters + 1:
        return math.inf
    squares = float(np.sum((np.log(value) - np.log(law.predict(compute))) ** 2))
    squares = max(squares, n * 1e-24)  # a law without any residual
    return n * math.log(squares / n) + 2 * parameters * n / (n - parameters - 1)
