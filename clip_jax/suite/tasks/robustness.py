"""Accuracy under natural distribution shift, beside that on the reference set (section 3.3)."""

import csv
import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from clip_jax.datasets.dataset import Dataset
from clip_jax.errors import UserError
from clip_jax.protocols import intervals, logistic, metrics, robustness
from clip_jax.suite.material import TEST, labelled
from clip_jax.suite.results import Found, Score
from clip_jax.suite.tasks import linear_probe, zeroshot
from clip_jax.suite.tasks.context import Context, Task


class Shifted(NamedTuple):
    """How one classifier does on a shift: accuracies, fractions.

    Attributes:
      reference: on the reference set, among the classes of the shift alone.
      shifted: on the shift.
    """

    reference: Score
    shifted: Score


def shifts(context: Context, dataset: Dataset) -> list[Dataset]:
    """The shifts of a data set among those that are evaluated."""
    return [each for each in context.datasets if each.base == dataset.name]


def run(context: Context, dataset: Dataset) -> Found:
    """Accuracy of the zero-shot classifier, and of the linear probe where there is training data.

    Both choose among the classes of the shift, on both sets, so that they can be compared.
    """
    names = dataset.prompt_set(context.settings.prompts)
    material = context.material
    classifiers = {
        "zero-shot": lambda which, split: zeroshot.similarities(material, which, split, names)
    }
    if linear_probe.TASK.applies(context, dataset):
        fitted = linear_probe.probe(context, dataset).fitted
        classifiers["linear probe"] = lambda which, split: logistic.scores(
            fitted, split.features, material.mesh
        )[0]
    base, targets = labelled(material, dataset, TEST)
    on_base = {name: classify(dataset, base) for name, classify in classifiers.items()}
    scores, rows = [], []
    testbed = read_testbed(context.settings.testbed)
    for shift in shifts(context, dataset):
        split, shift_targets = labelled(material, shift, TEST)
        for name, classify in classifiers.items():
            found = Shifted(
                _score(shift, f"{name}, reference", *_within(shift, on_base[name], targets)),
                _score(shift, name, restrict(shift, classify(shift, split)), shift_targets),
            )
            scores += [found.shifted, found.reference]
            rows.append(_row(shift, name, found, testbed))
    shifted = [row["shifted"] for row in rows if row["classifier"] == "zero-shot"]
    mean = Score(
        "robustness", dataset.name, "zero-shot, mean of shifts", "accuracy", float(np.mean(shifted))
    )
    return Found([mean, *scores], {"rows": rows, "testbed": testbed})


def restrict(shift: Dataset, scores: np.ndarray) -> np.ndarray:
    """Scores of the reference set's classes [n, c] -> of the shift's."""
    if not shift.base_classes:
        return scores
    return robustness.restrict(scores, shift.base_classes)


def _within(
    shift: Dataset, scores: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The reference set's examples of the shift's classes, and their targets among these."""
    own = shift.base_classes or tuple((label,) for label in range(scores.shape[1]))
    number = {label: place for place, labels in enumerate(own) for label in labels}
    rows = np.flatnonzero([label in number for label in targets.tolist()])
    return restrict(shift, scores[rows]), np.array([number[int(targets[row])] for row in rows])


def _score(shift: Dataset, variant: str, scores: np.ndarray, targets: np.ndarray) -> Score:
    right, n = int(metrics.correct(scores, targets).sum()), len(targets)
    low, high = intervals.clopper_pearson(right, n)
    return Score("robustness", shift.name, variant, "accuracy", right / n, low, high, n)


def _row(
    shift: Dataset, classifier: str, found: Shifted, testbed: Mapping[str, Any]
) -> dict[str, Any]:
    reference, shifted = found.reference.value, found.shifted.value
    row: dict[str, Any] = {
        "shift": shift.title,
        "name": shift.name,
        "classifier": classifier,
        "reference": reference,
        "shifted": shifted,
        "n": found.shifted.n,
        "effective": None,
    }
    if shift.name in testbed:
        others = np.array(testbed[shift.name])
        trend = robustness.fit(others[:, 0], others[:, 1])
        row["effective"] = float(robustness.effective(trend, reference, shifted))
    return row


def read_testbed(path: str) -> dict[str, list[tuple[float, float]]]:
    """Accuracies of other models, for the trend that robustness is measured against.

    Args:
      path: of a .csv file with columns model, dataset, reference, shifted; fractions. "": none.

    Returns:
      By data set, (reference, shifted) of each model.

    Raises:
      UserError: it cannot be read so.
    """
    if not path:
        return {}
    found: dict[str, list[tuple[float, float]]] = {}
    try:
        text = epath.Path(path).expanduser().read_text()
        for row in csv.DictReader(io.StringIO(text)):
            pair = float(row["reference"]), float(row["shifted"])
            if not all(0 <= value <= 1 for value in pair):
                raise ValueError(f"{pair} are no fractions between 0 and 1")
            found.setdefault(row["dataset"], []).append(pair)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"The testbed {path} cannot be read ({error}): it is a .csv file with the columns "
            "model, dataset, reference and shifted, a row for each model and shift, fractions."
        ) from error
    return found


TASK = Task(
    title="Robustness",
    roles=(TEST,),
    applies=lambda context, dataset: bool(shifts(context, dataset)),
    run=run,
)
