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
      pairs: the true and the chosen class of each pair that occurs, in order, int64 [pairs, 2].
      counts: number of images of each pair, int64 [pairs]. A matrix would take 80 GB for 100,000
        classes.
      mistakes: the most confident mistakes.
    """

    class_names: tuple[str, ...]
    pairs: np.ndarray
    counts: np.ndarray
    mistakes: Sequence[Mistake] = ()

    @property
    def totals(self) -> np.ndarray:
        """Number of images of each class, int64 [classes]."""
        return self._by_class(np.ones(len(self.pairs), bool))

    @property
    def right(self) -> np.ndarray:
        """Number of images of each class that are classified rightly, int64 [classes]."""
        return self._by_class(self.pairs[:, 0] == self.pairs[:, 1])

    @property
    def per_class(self) -> np.ndarray:
        """Accuracy of each class, float64 [classes]; NaN where it has no image."""
        with np.errstate(invalid="ignore"):
            return self.right / self.totals

    def matrix(self) -> np.ndarray:
        """Returns the counts as int64 [classes, classes], for few classes; rows: true."""
        counts = np.zeros([len(self.class_names)] * 2, np.int64)
        counts[self.pairs[:, 0], self.pairs[:, 1]] = self.counts
        return counts

    def _by_class(self, kept: np.ndarray) -> np.ndarray:
        sums = np.zeros(len(self.class_names), np.int64)
        np.add.at(sums, self.pairs[kept, 0], self.counts[kept])
        return sums


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
    chosen = ranked[:, 0]
    pairs, counts = np.unique(np.stack([labels, chosen], axis=1), axis=0, return_counts=True)
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
    return Confusion(tuple(class_names), pairs, counts, mistakes)


def to_json(confusion: Confusion) -> dict[str, Any]:
    """Converts to a form that JSON can hold; the inverse of `from_json`."""
    return {
        "class_names": list(confusion.class_names),
        "counts": np.column_stack([confusion.pairs, confusion.counts]).tolist(),
        "mistakes": [
            dataclasses.asdict(mistake) | {"image": dataclasses.asdict(thumbnail(mistake.image))}
            for mistake in confusion.mistakes
        ],
    }


def from_json(fields: Mapping[str, Any]) -> Confusion:
    """Converts back what `to_json` returned."""
    counts = np.array(fields["counts"], np.int64).reshape(-1, 3)
    mistakes = [
        Mistake(**mistake | {"image": Thumbnail(**mistake["image"])})
        for mistake in fields["mistakes"]
    ]
    return Confusion(tuple(fields["class_names"]), counts[:, :2], counts[:, 2], mistakes)


def view(confusion: Confusion) -> dict[str, Any]:
    """Returns everything that a page shows, in the order it shows it."""
    names, totals, right = confusion.class_names, confusion.totals, confusion.right
    per_class = confusion.per_class
    wrong = confusion.pairs[:, 0] != confusion.pairs[:, 1]
    # The most frequent first; of equal ones in the order of the classes.
    order = np.argsort(-confusion.counts[wrong], kind="stable")
    mistaken = np.column_stack([confusion.pairs, confusion.counts])[wrong][order].tolist()
    taken_for: dict[int, tuple[int, int]] = {}
    for i, j, count in mistaken:
        taken_for.setdefault(i, (j, count))
    rows = [
        {
            "name": name,
            "n": int(totals[i]),
            "right": int(right[i]),
            "accuracy": float(per_class[i]),
            "taken_for": names[taken_for[i][0]] if i in taken_for else "",
            "times": taken_for[i][1] if i in taken_for else 0,
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
        "heat_map": _heat_map(confusion) if few else None,
        "pairs": []
        if few
        else [
            {
                "true": names[i],
                "predicted": names[j],
                "count": count,
                "fraction": float(count / totals[i]),
            }
            for i, j, count in mistaken[:LISTED]
        ],
    }


def _heat_map(confusion: Confusion) -> list[list[dict[str, Any]]]:
    """Returns cells by row: the count, and its depth of colour in [0, 1] from its row's total."""
    counts = confusion.matrix()
    # The root lifts the few errors of a good model out of the ground colour.
    depth = np.sqrt(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    return [
        [
            {"count": int(count), "depth": f"{shade:.2f}", "strong": shade > 0.6}
            for count, shade in zip(*row)
        ]
        for row in zip(counts, depth)
    ]
