"""Straight lines by least squares, and how sure they are."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import special

from clip_jax.errors import UserError

CONFIDENCE = 0.95  # of intervals of slopes and intercepts


@dataclass(frozen=True)
class Line:
    """y = intercept + slope x.

    Attributes:
      slope, intercept: of the line.
      r2: share of y's variance that it explains; NaN where y does not vary.
      deviation: standard deviation of y about it, n - 2 degrees of freedom; NaN with two points.
      slope_interval, intercept_interval: by Student's t; NaN with two points.
      points: that it was fitted to.
    """

    slope: float
    intercept: float
    r2: float
    deviation: float
    slope_interval: tuple[float, float]
    intercept_interval: tuple[float, float]
    points: int


def fit(x: np.ndarray, y: np.ndarray, confidence: float = CONFIDENCE) -> Line:
    """The line with the least squares in y.

    Args:
      x, y: float [n], finite.
      confidence: of the intervals.

    Raises:
      UserError: fewer than two different x.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(np.unique(x)) < 2:
        raise UserError(
            f"A line needs two points that lie apart, and there is only {len(np.unique(x))}: add "
            "models or checkpoints that differ in what the line is drawn over."
        )
    n, centre = len(x), x.mean()
    spread = np.sum((x - centre) ** 2)
    slope = np.sum((x - centre) * (y - y.mean())) / spread
    intercept = y.mean() - slope * centre
    left = np.sum((y - intercept - slope * x) ** 2)
    total = np.sum((y - y.mean()) ** 2)
    deviation, times = math.nan, math.nan
    if n > 2:
        deviation = math.sqrt(left / (n - 2))
        times = float(special.stdtrit(n - 2, (1 + confidence) / 2))
    slope_half = times * deviation / math.sqrt(spread)
    intercept_half = times * deviation * math.sqrt(1 / n + centre**2 / spread)
    return Line(
        slope=float(slope),
        intercept=float(intercept),
        r2=float(1 - left / total) if total > 0 else math.nan,
        deviation=deviation,
        slope_interval=(float(slope - slope_half), float(slope + slope_half)),
        intercept_interval=(float(intercept - intercept_half), float(intercept + intercept_half)),
        points=n,
    )
