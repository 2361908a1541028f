"""Which class was taken for which: what a classification comes to, whatever chose the classes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from clip_jax.common.pages.page import Picture, Thumbnail, thumbnail
from clip_jax.evaluate.run_results import Mistake, ZeroshotResult

BEST = 5  # classes kept of each image
_MISTAKES = 12  # shown in the report
_CHUNK = 4096  # rows of logits worked on at a time


def rank(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best classes and the probability of the very best.

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
    templates: Sequence[str],
    picture: Callable[[int], Picture],
    by_score: bool = False,
) -> ZeroshotResult:
    """Everything a report shows of a classification.

    Args:
      labels: int [n], of the images.
      ranked, probabilities: as from `rank`.
      class_names: to show.
      templates: of the prompts, to show.
      picture: of image i, for the most confident mistakes.
      by_score: as in `ZeroshotResult`.
    """
    classes = len(class_names)
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, ranked[:, 0]), 1)
    right = ranked == labels[:, None]
    with np.errstate(invalid="ignore"):
        per_class = np.diagonal(counts) / counts.sum(axis=1)
    wrong = np.flatnonzero(~right[:, 0])
    worst = wrong[np.argsort(-probabilities[wrong], kind="stable")][:_MISTAKES]
    return ZeroshotResult(
        class_names=tuple(class_names),
        templates=tuple(templates),
        confusion=counts,
        top1=float(right[:, 0].mean()),
        top5=float(right.any(axis=1).mean()) if classes > BEST else None,
        per_class=per_class,
        n=len(labels),
        mistakes=[
            Mistake(
                image=picture(int(row)),
                true=class_names[labels[row]],
                predicted=class_names[ranked[row, 0]],
                probability=float(probabilities[row]),
            )
            for row in worst
        ],
        by_score=by_score,
    )


def to_json(result: ZeroshotResult) -> dict[str, Any]:
    """Everything, in a form that JSON can hold; the inverse of `from_json`."""
    rows, columns = np.nonzero(result.confusion)
    return {
        "class_names": list(result.class_names),
        "templates": list(result.templates),
        "counts": [[int(i), int(j), int(result.confusion[i, j])] for i, j in zip(rows, columns)],
        "top1": result.top1,
        "top5": result.top5,
        "n": result.n,
        "mistakes": [
            dataclasses.asdict(mistake) | {"image": dataclasses.asdict(thumbnail(mistake.image))}
            for mistake in result.mistakes
        ],
    }


def from_json(fields: Mapping[str, Any]) -> ZeroshotResult:
    """What `to_json` made of a result."""
    classes = len(fields["class_names"])
    counts = np.zeros((classes, classes), np.int64)
    for i, j, count in fields["counts"]:
        counts[i, j] = count
    with np.errstate(invalid="ignore"):
        per_class = np.diagonal(counts) / counts.sum(axis=1)
    return ZeroshotResult(
        class_names=tuple(fields["class_names"]),
        templates=tuple(fields["templates"]),
        confusion=counts,
        top1=fields["top1"],
        top5=fields["top5"],
        per_class=per_class,
        n=fields["n"],
        mistakes=[
            Mistake(**mistake | {"image": Thumbnail(**mistake["image"])})
            for mistake in fields["mistakes"]
        ],
    )
