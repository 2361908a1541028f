"""Accuracy under natural distribution shift (paper section 3.3; Taori et al. 2020).

Over many models, the accuracy on a shifted set is a line in the accuracy on the reference set
once both are seen as log-odds. The accuracy of a model above that line is its effective robustness.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Real
from scipy import special

from clip_jax.errors import UserError
from clip_jax.evaluate.measures import lines


@dataclass(frozen=True)
class Trend:
    """The accuracy on a shifted set as predicted from that on the reference set.

    Attributes:
      line: the fit, in log-odds.
      ignored: number of models with accuracy 0 or 1 on either set, whose log-odds are infinite.
    """

    line: lines.Line
    ignored: int

    def predict(
        self, reference: float | Real[np.ndarray, "*models"]
    ) -> Float[np.ndarray, "*models"]:
        """Predicts the accuracy under shift; 0 and 1 take the line's limits."""
        if self.line.slope == 0:
            return np.full(np.shape(reference), special.expit(self.line.intercept))
        log_odds = self.line.intercept + self.line.slope * special.logit(reference)
        return np.asarray(special.expit(log_odds))


def fit(
    reference: Real[np.ndarray, " models"],
    shifted: Real[np.ndarray, " models"],
    confidence: float = lines.CONFIDENCE,
) -> Trend:
    """Fits the trend over a set of models without interventions for robustness.

    Args:
      reference: accuracies on the reference set, fractions.
      shifted: accuracies of the same models on the shifted set.
      confidence: coverage of the line's intervals.

    Raises:
      UserError: fewer than two models with accuracies that differ and are neither 0 nor 1.
    """
    both = np.stack([np.asarray(reference, np.float64), np.asarray(shifted, np.float64)])
    kept = np.all((both > 0) & (both < 1), axis=0)
    x, y = special.logit(both[:, kept])
    return Trend(lines.fit(x, y, confidence), ignored=int(np.sum(~kept)))


def effective(
    trend: Trend,
    reference: float | Real[np.ndarray, "*models"],
    shifted: float | Real[np.ndarray, "*models"],
) -> Float[np.ndarray, "*models"]:
    """Computes effective robustness: accuracy under shift above the trend, fractions."""
    return np.asarray(shifted - trend.predict(reference))


def relative(
    shifted: float | Real[np.ndarray, "*models"], baseline: float | Real[np.ndarray, "*models"]
) -> Float[np.ndarray, "*models"]:
    """Computes relative robustness: accuracy under shift above that before an intervention."""
    return np.asarray(shifted - np.asarray(baseline))


def restrict(
    scores: Float[np.ndarray, "n classes"], classes: Sequence[int | Sequence[int]]
) -> Float[np.ndarray, "n shifted_classes"]:
    """Restricts scores to the classes of a shifted set, as ImageNet-A and -R are judged.

    Args:
      scores: scores of all classes of the reference set.
      classes: for each class of the shifted set its number in the reference set; or several
        numbers, of which the highest score counts (ObjectNet, ImageNet-Vid and Youtube-BB have
        classes that are several of ImageNet's).

    Raises:
      UserError: a number that there is not, or twice.
    """
    groups = [np.atleast_1d(np.asarray(numbers, np.int64)) for numbers in classes]
    if not groups or not all(map(len, groups)):
        raise UserError("A shifted set names a class without any class of its reference set.")
    members = np.concatenate(groups)
    if members.min() < 0 or members.max() >= scores.shape[1]:
        raise UserError(
            f"A shifted set names classes {members.min()} to {members.max()} of its reference set, "
            f"which has 0 to {scores.shape[1] - 1}: one of the two lists of classes is wrong."
        )
    if len(np.unique(members)) < len(members):
        raise UserError("A shifted set names a class of its reference set twice.")
    starts = np.cumsum([0, *map(len, groups)])[:-1]
    return np.maximum.reduceat(scores[:, members], starts, axis=1)
