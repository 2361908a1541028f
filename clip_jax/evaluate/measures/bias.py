"""Bias probes over images of people with group labels (paper section 7.1).

A model chooses among the classes of a data set and classes that were added to them. The probe
tabulates what fraction of each group lands in the added classes, and which labels differ most
between groups.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import special

from clip_jax.errors import UserError
from clip_jax.evaluate.measures import intervals
from clip_jax.evaluate.measures.intervals import CONFIDENCE, Proportion

EVERYONE = "all"  # the row of all images together


@dataclass(frozen=True)
class Table:
    """Proportions of images, by group and column.

    Attributes:
      columns: names, such as categories of classes.
      rows: one proportion per column for each group, `EVERYONE` first.
    """

    columns: tuple[str, ...]
    rows: Mapping[str, tuple[Proportion, ...]]


@dataclass(frozen=True)
class LabelDifference:
    """The frequency of a label in each group.

    Attributes:
      label: name of the label.
      proportions: proportion of the images of each group that get the label.
      statistic: Pearson's chi-squared of label against group, without a continuity correction; 0
        where all images get it, or none.
      p_value: significance of the statistic, groups - 1 degrees of freedom.
    """

    label: str
    proportions: Mapping[str, Proportion]
    statistic: float
    p_value: float


def cross(*labels: Sequence[str]) -> list[str]:
    """Crosses several attributes to groups: "Black, Female"; "" where one is not known."""
    return [", ".join(values) if all(values) else "" for values in zip(*labels, strict=True)]


def without(
    probabilities: Float[np.ndarray, "n classes"],
    class_names: Sequence[str],
    excluded: Sequence[str],
) -> Float[np.ndarray, "n classes"]:
    """Renormalises probabilities as if some classes had not been offered: theirs are 0.

    Args:
      probabilities: rows of a softmax.
      class_names: names of the columns.
      excluded: classes that are not offered.

    Raises:
      UserError: there is no class of such a name.
    """
    kept = np.ones(len(class_names), bool)
    kept[_class_ids(class_names, excluded)] = False
    remaining = np.where(kept, probabilities, 0)
    return remaining / remaining.sum(axis=1, keepdims=True)


def proportions(
    hits: Mapping[str, Bool[np.ndarray, " n"]],
    groups: Sequence[str],
    confidence: float = CONFIDENCE,
) -> Table:
    """Tabulates the proportion of each group's images that are hits.

    Args:
      hits: for each column, whether each image is a hit (misclassified, given a label, ...).
      groups: group of each image; "": not known, counted in the row of all images only.
      confidence: coverage of the intervals.
    """
    members = {EVERYONE: np.ones(len(groups), bool), **_members(groups)}
    rows = {
        group: tuple(
            intervals.proportion(int(np.sum(hit & inside)), int(inside.sum()), confidence)
            for hit in hits.values()
        )
        for group, inside in members.items()
    }
    return Table(tuple(hits), rows)


def categories(
    probabilities: Float[np.ndarray, "n classes"],
    class_names: Sequence[str],
    members: Mapping[str, Sequence[str]],
    groups: Sequence[str],
    confidence: float = CONFIDENCE,
) -> Table:
    """Tabulates the proportion of each group's images whose most probable class is in a category.

    Args:
      probabilities: rows of a softmax; of equal ones the first counts.
      class_names: names of the columns: the classes of the data set and those added.
      members: class names by category: "crime-related", "non-human", ...
      groups: group of each image, as in `proportions`; `cross` makes intersections.
      confidence: coverage of the intervals.

    Raises:
      UserError: a category names a class that there is not, or a probability is not a number.
    """
    chosen = _checked(probabilities, class_names).argmax(axis=1)
    hits = {
        category: np.isin(chosen, _class_ids(class_names, names))
        for category, names in members.items()
    }
    return proportions(hits, groups, confidence)


def label_differences(
    probabilities: Float[np.ndarray, "n labels"],
    class_names: Sequence[str],
    groups: Sequence[str],
    threshold: float,
    confidence: float = CONFIDENCE,
) -> list[LabelDifference]:
    """Compares the frequency of every label between groups, the largest difference first.

    Labels that no image gets are left out.

    Args:
      probabilities: probability of each label.
      class_names: the labels.
      groups: group of each image; "": not known, left out.
      threshold: an image gets every label with a probability of at least this.
      confidence: coverage of the intervals.

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
            proportions={
                group: intervals.proportion(int(count), int(size), confidence)
                for group, count, size in zip(members, counts[:, label], sizes)
            },
            statistic=float(statistics[label]),
            p_value=float(p_values[label]),
        )
        for label in np.argsort(-statistics, kind="stable")
    ]
    return [row for row in found if any(each.successes for each in row.proportions.values())]


def _chi_squared(
    counts: Int[np.ndarray, "groups labels"], sizes: Int[np.ndarray, " groups"]
) -> Float[np.ndarray, " labels"]:
    """Computes the statistic of each table {given, not given} x groups."""
    rate = counts.sum(axis=0) / sizes.sum()
    expected = sizes[:, None] * rate
    # Given and not given deviate by the same number; their two terms have this common form.
    variance = expected * (1 - rate)
    terms = np.divide(
        (counts - expected) ** 2, variance, out=np.zeros(counts.shape), where=variance > 0
    )
    return terms.sum(axis=0)


def _members(groups: Sequence[str]) -> dict[str, Bool[np.ndarray, " n"]]:
    """Returns the images of each group, by its name, sorted."""
    names = np.asarray(groups, str)
    return {str(name): names == name for name in np.unique(names) if name}


def _class_ids(class_names: Sequence[str], names: Sequence[str]) -> list[int]:
    ids = {name: number for number, name in enumerate(class_names)}
    if unknown := [name for name in names if name not in ids]:
        raise UserError(
            f"There is no class {unknown[0]!r} in the bias probe; its classes are: "
            f"{', '.join(class_names)}."
        )
    return [ids[name] for name in names]


def _checked(
    probabilities: Float[np.ndarray, "n columns"], class_names: Sequence[str]
) -> Float[np.ndarray, "n columns"]:
    probabilities = np.asarray(probabilities)
    if probabilities.ndim != 2 or probabilities.shape[1] != len(class_names):
        raise UserError(
            f"The bias probe has {len(class_names)} class names and probabilities of shape "
            f"{list(probabilities.shape)}: one column per class is needed."
        )
    if np.isnan(probabilities).any():
        raise UserError("The bias probe got probabilities that are not numbers: a broken model.")
    return probabilities
