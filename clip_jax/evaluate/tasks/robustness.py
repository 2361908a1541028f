"""Accuracy under natural distribution shift, beside that on the reference set (section 3.3)."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from clip_jax.errors import StorageError, UserError
from clip_jax.evaluate.embedding_source import TEST, labelled
from clip_jax.evaluate.measures import intervals, logistic, metrics, robustness
from clip_jax.evaluate.results import Found, Score
from clip_jax.evaluate.sets.dataset import Dataset
from clip_jax.evaluate.tasks import linear_probe, zeroshot
from clip_jax.evaluate.tasks.context import Context, Task, recognizes
from clip_jax.storage import locations, ranges


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
        split, own_targets = labelled(material, shift, TEST)
        common = Common.of(shift, dataset)
        for name, classify in classifiers.items():
            on_shift = common.judge(classify(shift, split), own_targets, common.of_shift)
            reference = common.judge(on_base[name], targets, common.of_reference)
            found = Shifted(
                _score(shift, f"{name}, reference", *reference), _score(shift, name, *on_shift)
            )
            scores += [found.shifted, found.reference]
            rows.append(_row(shift, name, found, testbed))
    shifted = [row["shifted"] for row in rows if row["classifier"] == "zero-shot"]
    mean = Score(
        "robustness", dataset.name, "zero-shot, mean of shifts", "accuracy", float(np.mean(shifted))
    )
    return Found([mean, *scores], {"rows": rows, "testbed": testbed})


class Common(NamedTuple):
    """The classes that a shift and its reference set have in common, c of them.

    Attributes:
      groups: for each, its classes in the reference set.
      of_reference, of_shift: the number of each class of either among them.
    """

    groups: list[Sequence[int]]
    of_reference: Mapping[int, int]
    of_shift: Mapping[int, int]

    @classmethod
    def of(cls, shift: Dataset, reference: Dataset) -> "Common":
        own = shift.base_classes or tuple((i,) for i in range(len(reference.class_names)))
        shared = [(label, group) for label, group in enumerate(own) if group]
        return cls(
            groups=[group for _, group in shared],
            of_reference={old: new for new, (_, group) in enumerate(shared) for old in group},
            of_shift={label: new for new, (label, _) in enumerate(shared)},
        )

    def judge(
        self, scores: np.ndarray, targets: np.ndarray, numbers: Mapping[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The examples of these classes, and scores among these classes alone.

        Args:
          scores: [n, classes of the reference set].
          targets: int [n], as one of the two sets counts its classes.
          numbers: `of_reference` or `of_shift`.

        Returns:
          Scores [m, c], and targets [m] among the c.
        """
        rows = np.flatnonzero([label in numbers for label in targets.tolist()])
        among = np.array([numbers[label] for label in targets[rows].tolist()], np.int64)
        return robustness.restrict(scores[rows], self.groups), among


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
    place = locations.parse(path)
    try:
        text = ranges.read(place).decode()
        for row in csv.DictReader(io.StringIO(text)):
            pair = float(row["reference"]), float(row["shifted"])
            if not all(0 <= value <= 1 for value in pair):
                raise ValueError(f"{pair} are no fractions between 0 and 1")
            found.setdefault(row["dataset"], []).append(pair)
    except StorageError:
        raise
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"The testbed {path} cannot be read ({error}): it is a .csv file with the columns "
            "model, dataset, reference and shifted, a row for each model and shift, fractions."
        ) from error
    return found


TASK = Task(
    title="Robustness",
    roles=(TEST,),
    takes="a reference set with prompts beside shifts of it, and a model that knows texts",
    applies=lambda context, dataset: (
        bool(shifts(context, dataset)) and recognizes(context, dataset)
    ),
    run=run,
)
