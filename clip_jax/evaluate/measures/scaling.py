"""Error as a power of compute (paper section 3.1.5, figure 9)."""

import math
from dataclasses import dataclass

import numpy as np

from clip_jax.evaluate.measures import lines


@dataclass(frozen=True)
class PowerLaw:
    """error = constant * compute ** exponent.

    Attributes:
      exponent: below 0 where more compute helps.
      constant: the error at a compute of 1, in the unit of the compute.
      exponent_interval: (low, high); NaN with two points.
      deviation: standard deviation of the natural logarithm of the error about the law; NaN with
        two points.
      r2: share of the variance of the error's logarithm that the law explains.
      points: that it was fitted to.
      left_out: points with an error of 0, whose logarithm is infinite.
    """

    exponent: float
    constant: float
    exponent_interval: tuple[float, float]
    deviation: float
    r2: float
    points: int
    left_out: int

    def predict(self, compute: float | np.ndarray) -> np.ndarray:
        return self.constant * np.asarray(compute, np.float64) ** self.exponent


def fit(compute: np.ndarray, error: np.ndarray, confidence: float = lines.CONFIDENCE) -> PowerLaw:
    """The least squares of the logarithms.

    Args:
      compute: of each model or checkpoint, float [n], positive, in any unit.
      error: of each, a fraction.
      confidence: of the exponent's interval.

    Raises:
      UserError: fewer than two points that differ in compute and have an error above 0.
    """
    compute, error = np.asarray(compute, np.float64), np.asarray(error, np.float64)
    above = error > 0
    line = lines.fit(np.log(compute[above]), np.log(error[above]), confidence)
    return PowerLaw(
        exponent=line.slope,
        constant=math.exp(line.intercept),
        exponent_interval=line.slope_interval,
        deviation=line.deviation,
        r2=line.r2,
        points=line.points,
        left_out=int(np.sum(~above)),
    )
