"""The band in which the curves of sound runs lie, and where another run leaves it.

A curve is averaged over windows of a few logged steps. In each window the seeds of the reference
give a mean and a variance, and the band is where one more seed is expected: the prediction interval
of Student's t, of logarithms where a metric is positive. Its risk is divided among the metrics, and
among the windows of each (Bonferroni). Windows that go up and down together, as those of the logit
scale do, count for fewer, there and where their variances are averaged.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from clip_jax.errors import UserError
from clip_jax.status.reference import Reference

RISK = 0.05  # of a sound run, to leave the band somewhere
WINDOW = 5  # logged steps that are averaged; of evaluations, which are fewer, one
# Neighbours on either side whose variance is averaged with a window's: five seeds alone give it
# with four degrees of freedom.
_NEIGHBOURS = 2
# Least standard deviation, of a logarithm or a fraction: what bfloat16 and another order of
# additions may change is no fault.
_LEAST_DEVIATION = 0.005

Curves = Mapping[str, Mapping[int, float]]  # value by step, of each metric
# Middle and half-width of a band in each window.
Edges = tuple[Float[np.ndarray, " windows"], Float[np.ndarray, " windows"]]


@dataclasses.dataclass(frozen=True)
class Compared:
    """A metric of a run beside the band; windows that the run has not reached are left out.

    Attributes:
      metric: name of the metric.
      starts, ends: first and last logged step of each window.
      values: the run's means; NaN where one of them is not finite.
      low, high: edges of the band.
      distances: distance of each value from the middle of the band, in half-widths; infinite where
        the value is not finite.
    """

    metric: str
    starts: Int[np.ndarray, " windows"]
    ends: Int[np.ndarray, " windows"]
    values: Float[np.ndarray, " windows"]
    low: Float[np.ndarray, " windows"]
    high: Float[np.ndarray, " windows"]
    distances: Float[np.ndarray, " windows"]

    @property
    def outside(self) -> Bool[np.ndarray, " windows"]:
        """The windows in which the run is outside of the band."""
        return self.distances > 1

    @property
    def first(self) -> int | None:
        """The first window outside of the band; None: there is none."""
        return int(np.argmax(self.outside)) if self.outside.any() else None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A run beside a reference.

    Attributes:
      metrics: each metric of the reference.
      reached: last step of the run that is compared.
      complete: whether the run has every window of the reference.
    """

    metrics: Sequence[Compared]
    reached: int
    complete: bool

    @property
    def first(self) -> Compared | None:
        """The metric that left the band first, of several the one that went farthest there."""
        left = [one for one in self.metrics if one.first is not None]
        return min(left, key=_departure, default=None)


def _departure(one: Compared) -> tuple[int, float]:
    first = one.first or 0
    return int(one.ends[first]), -float(one.distances[first])


def compare(reference: Reference, curves: Curves, risk: float = RISK) -> Verdict:
    """Compares a run with the seeds of a reference.

    Args:
      reference: at least three runs.
      curves: the run's.
      risk: probability that a sound run leaves the band somewhere.

    Raises:
      UserError: the run lacks a metric, or steps of it, or ends before the first window.
    """
    windows = {metric: _windows(metric, steps) for metric, steps in reference.steps.items()}
    last = max((step for curve in curves.values() for step in curve), default=0)
    found, complete = [], True
    for metric, parts in windows.items():
        reached = _reached(metric, parts, curves.get(metric, {}), last)
        complete = complete and len(reached) == len(parts)
        if reached:
            edges = _band(_seeds(reference, metric, parts), risk / len(windows))
            found.append(_beside(metric, reached, curves[metric], edges))
    if not found:
        first = min(part[-1] for parts in windows.values() for part in parts)
        raise UserError(
            f"The run has come to step {last:,}; the first comparison with the reference "
            f"{reference.name} is at step {first:,}. Let it run on."
        )
    return Verdict(found, max(int(one.ends[-1]) for one in found), complete)


def _windows(metric: str, steps: Sequence[int]) -> list[Sequence[int]]:
    """Divides the steps of a metric into windows; the last ones, too few for another, are left."""
    size = WINDOW if _is_positive(metric) else 1
    return [steps[i : i + size] for i in range(0, len(steps) - size + 1, size)]


def _reached(
    metric: str, windows: Sequence[Sequence[int]], curve: Mapping[int, float], last: int
) -> Sequence[Sequence[int]]:
    """Returns the windows that a run has come to.

    Raises:
      UserError: it lacks steps on the way there.
    """
    # An evaluation at the last step may be under way.
    reached = [w for w in windows if w[-1] < last or (w[-1] == last and last in curve)]
    missing = [step for window in reached for step in window if step not in curve]
    if missing:
        listed = ", ".join(f"{step:,}" for step in missing[:3])
        more = f" and {len(missing) - 3} others" if len(missing) > 3 else ""
        every = "log.every" if _is_positive(metric) else "eval.every"
        raise UserError(
            f"The run has no {metric} at step {listed}{more}, where the reference has it. Train "
            f"with the reference's config and this version: --config.{every} gives the steps, and "
            "earlier versions log fewer metrics."
        )
    return reached


def _seeds(
    reference: Reference, metric: str, windows: Sequence[Sequence[int]]
) -> Float[np.ndarray, "seeds windows"]:
    """Returns the means of all runs of a reference."""
    steps = reference.steps[metric]
    runs = [dict(zip(steps, run[metric], strict=True)) for run in reference.runs.values()]
    return np.stack([_means(metric, windows, run) for run in runs])


def _beside(
    metric: str, windows: Sequence[Sequence[int]], curve: Mapping[int, float], edges: Edges
) -> Compared:
    """Compares one metric in the windows that a run has come to."""
    ours = _means(metric, windows, curve)
    middle, half = (part[: len(windows)] for part in edges)
    with np.errstate(invalid="ignore"):
        distances = np.abs(ours - middle) / half
    back = np.exp if _is_positive(metric) else np.asarray
    return Compared(
        metric,
        starts=np.array([window[0] for window in windows]),
        ends=np.array([window[-1] for window in windows]),
        values=back(ours),
        low=back(middle - half),
        high=back(middle + half),
        distances=np.where(np.isfinite(distances), distances, math.inf),
    )


def _band(means: Float[np.ndarray, "seeds windows"], risk: float) -> Edges:
    """Returns the band; `risk`: of a sound run, to be outside in some window."""
    count, windows = means.shape
    rest = means - means.mean(axis=0)
    variance = np.sum(rest**2, axis=0) / (count - 1)
    norms = np.maximum(np.linalg.norm(rest, axis=0), np.finfo(np.float64).tiny)
    alike = (rest.T @ rest / np.outer(norms, norms)) ** 2  # squared correlations
    np.fill_diagonal(alike, 1.0)
    near = [slice(max(0, i - _NEIGHBOURS), i + _NEIGHBOURS + 1) for i in range(windows)]
    pooled = np.array([variance[part].mean() for part in near])
    deviation = np.maximum(np.sqrt(pooled), _LEAST_DEVIATION)
    # A mean of variances has as many degrees of freedom as its own variance says.
    freedom = (count - 1) / np.array([alike[part, part].mean() for part in near])
    # Tests that are correlated count as so many (Nyholt 2004, doi:10.1086/383251).
    tests = windows - (alike.sum() - windows) / windows
    quantile = stats.t.ppf(1 - risk / tests / 2, freedom)
    return means.mean(axis=0), quantile * deviation * math.sqrt(1 + 1 / count)


def _means(
    metric: str, windows: Sequence[Sequence[int]], curve: Mapping[int, float]
) -> Float[np.ndarray, " windows"]:
    """Returns the mean of each window, its logarithm where the metric is positive."""
    means = np.array([np.mean([curve[step] for step in window]) for window in windows], np.float64)
    if not _is_positive(metric):
        return means
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(means)


def _is_positive(metric: str) -> bool:
    """Tells whether a metric is a loss, a norm or a scale, and no fraction."""
    return metric.startswith("train/")
