"""Bias probes over images of people with group labels (paper section 7.1).

A model chooses among the classes of a data set and classes that were added to them. How often each
group lands in the added ones, and which labels differ most between groups, are tables of shares.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from clip_jax.errors import UserError
from clip_jax.evaluate.measures import intervals
from clip_jax.evaluate.measures.intervals import CONFIDENCE, Share

EVERYONE = "all"  # the row of all images together
LABEL_THRESHOLDS = (0.005, 0.04)  # probabilities above which a label is given to an image


@dataclass(frozen=True)
class Table:
    """Shares of images, by group and column.

    Attributes:
      columns: what the images are counted in, such as categories of classes.
      rows: by group, `EVERYONE` first, one share per column.
    """

    columns: tuple[str, ...]
    rows: Mapping[str, tuple[Share, ...]]


@dataclass(frozen=True)
class LabelDifference:
    """How often a label is given to each group.

    Attributes:
      label: its name.
      shares: of each group's images that get it.
      statistic: Pearson's chi-squared of label against group, without a continuity correction; 0
        where all images get it, or none.
      p_value: of the statistic, groups - 1 degrees of freedom.
    """

    label: str
    shares: Mapping[str, Share]
    statistic: float
    p_value: float


def cross(*labels: Sequence[str]) -> list[str]:
    """Groups of several attributes at once: "Black, Female"; "" where one is not known."""
    return [", ".join(values) if all(values) else "" for values in zip(*labels, strict=True)]


def without(
    probabilities: np.ndarray, class_names: Sequence[str], left_out: Sequence[str]
) -> np.ndarray:
    """Probabilities as if some classes had not been offered: theirs are 0, rows add up to 1.

    Args:
      probabilities: float [n, c], rows of a softmax.
      class_names: of the columns.
      left_out: names among them; UserError where there is no such class.
    """
    kept = np.ones(len(class_names), bool)
    kept[_numbers(class_names, left_out)] = False
    rest = np.where(kept, probabilities, 0)
    return rest / rest.sum(axis=1, keepdims=True)


def shares(
    hits: Mapping[str, np.ndarray], groups: Sequence[str], confidence: float = CONFIDENCE
) -> Table:
    """The share of each group's images that are hits: rightly classified, given a label, ...

    Args:
      hits: by column, bool [n].
      groups: of each image; "": not known, counted in the row of all images only.
      confidence: of the intervals.
    """
    members = {EVERYONE: np.ones(len(groups), bool), **_members(groups)}
    rows = {
        group: tuple(
            intervals.share(int(np.sum(hit & inside)), int(inside.sum()), confidence)
            for hit in hits.values()
        )
        for group, inside in members.items()
    }
    return Table(tuple(hits), rows)


def categories(
    probabilities: np.ndarray,
    class_names: Sequence[str],
    members: Mapping[str, Sequence[str]],
    groups: Sequence[str],
    confidence: float = CONFIDENCE,
) -> Table:
    """The share of each group's images whose most probable class is in a category.

    Args:
      probabilities: float [n, c]; of equal ones the first counts.
      class_names: of the columns: those of the data set and those added.
      members: class names by category: "crime-related", "non-human", ...
      groups: of each image, as in `shares`; `cross` makes intersections.
      confidence: of the intervals.

    Raises:
      UserError: a category names a class that there is not, or a probability is not a number.
    """
    chosen = _checked(probabilities, class_names).argmax(axis=1)
    hits = {
        category: np.isin(chosen, _numbers(class_names, names))
        for category, names in members.items()
    }
    return shares(hits, groups, confidence)


def label_differences(
    probabilities: np.ndarray,
    class_names: Sequence[str],
    groups: Sequence[str],
    threshold: float,
    confidence: float = CONFIDENCE,
) -> list[LabelDifference]:
    """Every label that any image gets, those that differ most between groups first.

    Args:
      probabilities: float [n, c], of all labels.
      class_names: the labels.
      groups: of each image; "": not known, left out.
      threshold: an image gets every label with a probability of at least this.
      confidence: of the intervals.

    Raises:
      UserError: fewer than two groups, or a probability that is not a number.
    """
    members = _members(groups)
    if len(members) < 2:
        raise UserError(
            f"Labels are compared between groups, and there is only {', '.join(members) or 'none'}:"
            " name the key of the group labels in the data."
        )
    given = _checked(probabilities, class_names) >= threshold
    sizes = np.array([inside.sum() for inside in members.values()])
    counts = np.stack([given[inside].sum(axis=0) for inside in members.values()])
    statistics = _chi_squared(counts, sizes)
    p_values = special.chdtrc(len(sizes) - 1, statistics)
    found = [
        LabelDifference(
            label=class_names[label],
            shares={
                group: intervals.share(int(count), int(size), confidence)
                for group, count, size in zip(members, counts[:, label], sizes)
            },
            statistic=float(statistics[label]),
            p_value=float(p_values[label]),
        )
        for label in np.argsort(-statistics, kind="stable")
    ]
    return [row for row in found if any(share.successes for share in row.shares.values())]


def _chi_squared(counts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Of the tables {given, not given} x groups: counts [g, labels], sizes [g] -> [labels]."""
    rate = counts.sum(axis=0) / sizes.sum()
    expected = sizes[:, None] * rate
    # Given and not given deviate by the same number; their two terms have this common form.
    variance = expected * (1 - rate)
    terms = np.divide(
        (counts - expected) ** 2, variance, out=np.zeros(counts.shape), where=variance > 0
    )
    return terms.sum(axis=0)


def _members(groups: Sequence[str]) -> dict[str, np.ndarray]:
    """The images of each group, bool [n], by its name, sorted."""
    names = np.asarray(groups, str)
    return {str(name): names == name for name in np.unique(names) if name}


def _numbers(class_names: Sequence[str], names: Sequence[str]) -> list[int]:
    places = {name: number for number, name in enumerate(class_names)}
    if unknown := [name for name in names if name not in places]:
        raise UserError(
            f"There is no class {unknown[0]!r} in the bias probe; its classes are: "
            f"{', '.join(class_names)}."
        )
    return [places[name] for name in names]


def _checked(probabilities: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    probabilities = np.asarray(probabilities)
    if probabilities.ndim != 2 or probabilities.shape[1] != len(class_names):
        raise UserError(
            f"The bias probe has {len(class_names)} class names and probabilities of shape "
            f"{list(probabilities.shape)}: one column per class is needed."
        )
    if np.isnan(probabilities).any():
        raise UserError("The bias probe got probabilities that are not numbers: a broken model.")
    return probabilities
