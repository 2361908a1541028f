"""Confusion matrices of zero-shot classification, as JSON and as shown on pages."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from clip_jax.common.pages.pictures import Picture, Thumbnail, thumbnail

BEST = 5  # classes kept per image
HEAT_MAP_CLASSES = 40  # with more, the most confused pairs are listed instead
LISTED = 20  # worst classes and most confused pairs shown where there are too many for all
_MISTAKES = 12  # misclassified images shown
_CHUNK = 4096  # rows of logits per step


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A wrongly classified image.

    Attributes:
      image: the image.
      true: name of its class.
      predicted: name of the class chosen.
      probability: probability given to the class chosen.
    """

    image: Picture
    true: str
    predicted: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Confusion:
    """Images by true and chosen class.

    Attributes:
      class_names: names to show.
      counts: number of images, int64 [classes, classes]; rows: true, columns: chosen.
      mistakes: the most confident mistakes.
    """

    class_names: tuple[str, ...]
    counts: np.ndarray
    mistakes: Sequence[Mistake] = ()

    @property
    def per_class(self) -> np.ndarray:
        """Accuracy of each class, float64 [classes]; NaN where it has no image."""
        with np.errstate(invalid="ignore"):
            return np.diagonal(self.counts) / self.counts.sum(axis=1)


def rank(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds the best classes and the probability of the very best.

    Args:
      logits: float [n, classes].

    Returns:
      int64 [n, at most 5], best first, of equal ones the first; and float [n].
    """
    ranked, probabilities = [], []
    for start in range(0, len(logits), _CHUNK):
        part = logits[start : start + _CHUNK]
        ranked.append(np.argsort(-part, axis=1, kind="stable")[:, :BEST])
        probabilities.append(1 / np.exp(part - part.max(axis=1, keepdims=True)).sum(axis=1))
    return np.concatenate(ranked), np.concatenate(probabilities)


def summarize(
    labels: np.ndarray,
    ranked: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    picture: Callable[[int], Picture],
) -> Confusion:
    """Counts confusions and picks the most confident mistakes.

    Args:
      labels: classes of the images, int [n].
      ranked, probabilities: results of `rank`.
      class_names: names to show.
      picture: returns image i, for the mistakes.
    """
    counts = np.zeros((len(class_names), len(class_names)), np.int64)
    chosen = ranked[:, 0]
    np.add.at(counts, (labels, chosen), 1)
    wrong = np.flatnonzero(chosen != labels)
    worst = wrong[np.argsort(-probabilities[wrong], kind="stable")][:_MISTAKES]
    mistakes = [
        Mistake(
            image=picture(int(row)),
            true=class_names[labels[row]],
            predicted=class_names[chosen[row]],
            probability=float(probabilities[row]),
        )
        for row in worst
    ]
    return Confusion(tuple(class_names), counts, mistakes)


def to_json(confusion: Confusion) -> dict[str, Any]:
    """Converts to a form that JSON can hold; the inverse of `from_json`."""
    rows, columns = np.nonzero(confusion.counts)
    return {
        "class_names": list(confusion.class_names),
        "counts": [[int(i), int(j), int(confusion.counts[i, j])] for i, j in zip(rows, columns)],
        "mistakes": [
            dataclasses.asdict(mistake) | {"image": dataclasses.asdict(thumbnail(mistake.image))}
            for mistake in confusion.mistakes
        ],
    }


def from_json(fields: Mapping[str, Any]) -> Confusion:
    """Converts back what `to_json` returned."""
    classes = len(fields["class_names"])
    counts = np.zeros((classes, classes), np.int64)
    for i, j, count in fields["counts"]:
        counts[i, j] = count
    mistakes = [
        Mistake(**mistake | {"image": Thumbnail(**mistake["image"])})
        for mistake in fields["mistakes"]
    ]
    return Confusion(tuple(fields["class_names"]), counts, mistakes)


def view(confusion: Confusion) -> dict[str, Any]:
    """Returns everything that a page shows, in the order it shows it."""
    names, counts = confusion.class_names, confusion.counts
    wrong = counts - np.diag(np.diag(counts))
    totals, per_class = counts.sum(axis=1), confusion.per_class
    rows = [
        {
            "name": name,
            "n": int(totals[i]),
            "right": int(counts[i, i]),
            "accuracy": float(per_class[i]),
            "taken_for": names[wrong[i].argmax()],
            "times": int(wrong[i].max()),
        }
        for i, name in enumerate(names)
    ]
    few = len(names) <= HEAT_MAP_CLASSES
    tested = [row for row in rows if row["n"]]
    return {
        "class_names": names,
        "mistakes": confusion.mistakes,
        "rows": rows,
        "worst": [] if few else sorted(tested, key=lambda row: row["accuracy"])[:LISTED],
        "heat_map": _heat_map(counts) if few else None,
        "pairs": [] if few else _confused_pairs(names, wrong, totals),
    }


def _heat_map(counts: np.ndarray) -> list[list[dict[str, Any]]]:
    """Returns cells by row: the count, and its depth of colour in [0, 1] from its row's total."""
    # The root lifts the few errors of a good model out of the ground colour.
    depth = np.sqrt(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    return [
        [
            {"count": int(count), "depth": f"{shade:.2f}", "strong": shade > 0.6}
            for count, shade in zip(*row)
        ]
        for row in zip(counts, depth)
    ]


def _confused_pairs(
    names: Sequence[str], wrong: np.ndarray, totals: np.ndarray
) -> list[dict[str, Any]]:
    """Returns the pairs of classes confused most often, most frequent first."""
    order = np.argsort(-wrong, axis=None, kind="stable")[:LISTED]
    pairs = zip(*(axis.tolist() for axis in np.unravel_index(order, wrong.shape)))
    return [
        {
            "true": names[i],
            "predicted": names[j],
            "count": int(wrong[i, j]),
            "fraction": float(wrong[i, j] / totals[i]),
        }
        for i, j in pairs
        if wrong[i, j]
    ]
