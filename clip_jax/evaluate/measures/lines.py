"""Straight lines by least squares with their intervals, and power laws as lines of logarithms."""

import math
from dataclasses import dataclass

import numpy as np
import scipy  # whose stats load at first use: reports without a line do not wait for them
from jaxtyping import Float, Real

from clip_jax.errors import UserError

CONFIDENCE = 0.95  # coverage of the intervals of slopes and intercepts


@dataclass(frozen=True)
class Line:
    """y = intercept + slope x.

    Attributes:
      slope, intercept: coefficients of the line.
      r2: fraction of the variance of y that the line explains; NaN where y does not vary.
      deviation: standard deviation of y about the line, n - 2 degrees of freedom; NaN with two
        points.
      slope_interval, intercept_interval: confidence intervals by Student's t; NaN with two
        points.
      points: number of points.
    """

    slope: float
    intercept: float
    r2: float
    deviation: float
    slope_interval: tuple[float, float]
    intercept_interval: tuple[float, float]
    points: int


@dataclass(frozen=True)
class PowerLaw:
    """error = constant * compute ** exponent (paper section 3.1.5, figure 9).

    Attributes:
      exponent: negative where more compute helps.
      constant: error at a compute of 1, in the unit of the compute.
      exponent_interval: (low, high); NaN with two points.
      deviation: standard deviation of the natural logarithm of the error about the law; NaN with
        two points.
      r2: fraction of the variance of the error's logarithm that the law explains.
      points: number of points.
      ignored: number of points with an error of 0, whose logarithm is infinite.
    """

    exponent: float
    constant: float
    exponent_interval: tuple[float, float]
    deviation: float
    r2: float
    points: int
    ignored: int

    def predict(self, compute: float | Real[np.ndarray, "*models"]) -> Float[np.ndarray, "*models"]:
        """Returns the error that the law gives for a compute."""
        return np.asarray(self.constant * np.asarray(compute, np.float64) ** self.exponent)


def fit(
    x: Real[np.ndarray, " n"], y: Real[np.ndarray, " n"], confidence: float = CONFIDENCE
) -> Line:
    """Fits a line by least squares in y.

    Args:
      x, y: coordinates, finite.
      confidence: coverage of the intervals.

    Raises:
      UserError: fewer than two different x.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    n, distinct = len(x), len(np.unique(x))
    if distinct < 2:
        raise UserError(
            f"A line needs two points that lie apart, and there is only {distinct}: add "
            "models or checkpoints that differ in what the line is drawn over."
        )
    line = scipy.stats.linregress(x, y)
    deviation, quantile = math.nan, math.nan
    if n > 2:
        residuals = y - line.intercept - line.slope * x
        deviation = math.sqrt(np.sum(residuals**2) / (n - 2))
        quantile = float(scipy.stats.t.ppf((1 + confidence) / 2, n - 2))
    return Line(
        slope=float(line.slope),
        intercept=float(line.intercept),
        r2=float(line.rvalue**2) if np.ptp(y) > 0 else math.nan,
        deviation=deviation,
        slope_interval=_interval(line.slope, quantile * line.stderr),
        intercept_interval=_interval(line.intercept, quantile * line.intercept_stderr),
        points=n,
    )


def fit_power_law(
    compute: Real[np.ndarray, " n"], error: Real[np.ndarray, " n"], confidence: float = CONFIDENCE
) -> PowerLaw:
    """Fits a power law by least squares of the logarithms.

    Args:
      compute: compute of each model or checkpoint, positive, in any unit.
      error: error of each, a fraction.
      confidence: coverage of the exponent's interval.

    Raises:
      UserError: fewer than two points that differ in compute and have an error above 0.
    """
    compute, error = np.asarray(compute, np.float64), np.asarray(error, np.float64)
    kept = error > 0
    line = fit(np.log(compute[kept]), np.log(error[kept]), confidence)
    return PowerLaw(
        exponent=line.slope,
        constant=math.exp(line.intercept),
        exponent_interval=line.slope_interval,
        deviation=line.deviation,
        r2=line.r2,
        points=line.points,
        ignored=int(np.sum(~kept)),
    )


def _interval(centre: float, half_width: float) -> tuple[float, float]:
    return float(centre - half_width), float(centre + half_width)
