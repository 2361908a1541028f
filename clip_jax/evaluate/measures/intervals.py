"""How sure a share is that was seen in independent trials: intervals and tests."""

import math
from dataclasses import dataclass

from scipy import special

CONFIDENCE = 0.995  # of the paper's intervals


@dataclass(frozen=True)
class Share:
    """So many of so many, with a Clopper-Pearson interval; NaN where there were no trials."""

    successes: int
    trials: int
    value: float
    low: float
    high: float


def share(successes: int, trials: int, confidence: float = CONFIDENCE) -> Share:
    low, high = clopper_pearson(successes, trials, confidence)
    value = successes / trials if trials else math.nan
    return Share(int(successes), int(trials), value, low, high)


def clopper_pearson(
    successes: int, trials: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The exact interval: its ends are the shares that the data just do not refute.

    Args:
      successes: of the trials.
      trials: independent ones; none: the interval is (0, 1).
      confidence: that the true share is inside, at least; each tail has half of the rest.
    """
    _check(successes, trials)
    tail, failures = (1 - confidence) / 2, trials - successes
    low = special.betaincinv(successes, failures + 1, tail) if successes else 0.0
    high = special.betainccinv(successes + 1, failures, tail) if failures else 1.0
    return float(low), float(high)


def wilson(successes: int, trials: int, confidence: float) -> tuple[float, float]:
    """The score interval: shorter than the exact one, and right on average over shares."""
    _check(successes, trials)
    if trials == 0:
        return 0.0, 1.0
    z2 = special.ndtri((1 + confidence) / 2) ** 2
    seen, whole = successes / trials, 1 + z2 / trials
    centre = (seen + z2 / (2 * trials)) / whole
    variance = seen * (1 - seen) / trials + z2 / (4 * trials**2)
    half = math.sqrt(z2 * variance) / whole
    return float(centre - half), float(centre + half)


def binomial_greater(successes: int, trials: int, p: float) -> float:
    """The one-sided p-value: chance of as many successes or more, each having probability p."""
    _check(successes, trials)
    return float(special.betainc(successes, trials - successes + 1, p)) if successes else 1.0


def bonferroni(level: float, tests: int) -> float:
    """Below which p-value one of so many tests is significant at `level` for all together."""
    return level / max(tests, 1)


def _check(successes: int, trials: int) -> None:
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials")
