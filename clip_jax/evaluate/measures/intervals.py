"""Confidence intervals and tests of proportions seen in independent trials."""

import math
from dataclasses import dataclass

import scipy  # whose parts load at first use: training does not wait for them

CONFIDENCE = 0.995  # coverage of the paper's intervals


@dataclass(frozen=True)
class Proportion:
    """A proportion with its Clopper-Pearson interval.

    Attributes:
      successes: number of successes.
      trials: number of trials.
      value: successes / trials; NaN without trials.
      low, high: ends of the interval.
    """

    successes: int
    trials: int
    value: float
    low: float
    high: float


def proportion(successes: int, trials: int, confidence: float = CONFIDENCE) -> Proportion:
    """Returns a proportion with its Clopper-Pearson interval."""
    low, high = clopper_pearson(successes, trials, confidence)
    value = successes / trials if trials else math.nan
    return Proportion(int(successes), int(trials), value, low, high)


def clopper_pearson(
    successes: int, trials: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Computes the exact interval of a proportion.

    Args:
      successes: number of successes.
      trials: number of independent trials; 0: the interval is (0, 1).
      confidence: least probability that the interval covers the true proportion; each tail has
        half of the rest.
    """
    _check(successes, trials)
    tail, failures = (1 - confidence) / 2, trials - successes
    # Quantiles of beta distributions. `binomtest` finds the same by a root search, 30 times as
    # slowly, and a sweep over thresholds asks for hundreds.
    low = scipy.special.betaincinv(successes, failures + 1, tail) if successes else 0.0
    high = scipy.special.betainccinv(successes + 1, failures, tail) if failures else 1.0
    return float(low), float(high)


def wilson(successes: int, trials: int, confidence: float) -> tuple[float, float]:
    """Computes the score interval: shorter than the exact one, and of the right average coverage.

    Args:
      successes: number of successes.
      trials: number of independent trials; 0: the interval is (0, 1).
      confidence: probability that the interval covers the true proportion.
    """
    _check(successes, trials)
    if trials == 0:
        return 0.0, 1.0
    interval = scipy.stats.binomtest(successes, trials).proportion_ci(confidence, "wilson")
    return float(interval.low), float(interval.high)


def binomial_greater(successes: int, trials: int, p: float) -> float:
    """Computes a one-sided p-value: the probability of as many successes or more.

    Args:
      successes: number of successes.
      trials: number of independent trials.
      p: probability of a success under the null hypothesis.
    """
    _check(successes, trials)
    return float(scipy.stats.binom.sf(successes - 1, trials, p))


def bonferroni(level: float, tests: int) -> float:
    """Returns the p-value below which one of several tests is significant at `level` for all."""
    return level / max(tests, 1)


def _check(successes: int, trials: int) -> None:
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials")
