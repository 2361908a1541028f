"""Accuracy under natural distribution shift and on the reference set (paper section 3.3)."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from clip_jax.errors import StorageError, UserError
from clip_jax.evaluate.embedding_source import TEST, labelled
from clip_jax.evaluate.measures import intervals, logistic, metrics, robustness
from clip_jax.evaluate.results import Findings, Score
from clip_jax.evaluate.sets.dataset import Dataset
from clip_jax.evaluate.tasks import linear_probe, zeroshot
from clip_jax.evaluate.tasks.context import Context, Task, recognizes
from clip_jax.storage import locations, ranges


class Shifted(NamedTuple):
    """The accuracies of one classifier.

    Attributes:
      reference: accuracy on the reference set, among the classes of the shift only.
      shifted: accuracy on the shift.
    """

    reference: Score
    shifted: Score


def shifts(context: Context, dataset: Dataset) -> list[Dataset]:
    """Returns the evaluated data sets that are shifts of this one."""
    return [each for each in context.datasets if each.base == dataset.name]


def run(context: Context, dataset: Dataset) -> Findings:
    """Measures the zero-shot classifier, and the linear probe if there is training data.

    On both sets, both choose among the classes of the shift, so that accuracies are comparable.
    """
    names = dataset.prompt_set(context.settings.prompts)
    embeddings = context.embeddings
    classifiers = {
        "zero-shot": lambda which, split: zeroshot.similarities(embeddings, which, split, names)
    }
    if linear_probe.TASK.supports(context, dataset):
        fitted = linear_probe.probe(context, dataset).fitted
        classifiers["linear probe"] = lambda which, split: logistic.scores(
            fitted, split.features, embeddings.mesh
        )[0]
    base, targets = labelled(embeddings, dataset, TEST)
    on_base = {name: classify(dataset, base) for name, classify in classifiers.items()}
    scores, rows = [], []
    testbed = read_testbed(context.settings.testbed)
    for shift in shifts(context, dataset):
        split, own_targets = labelled(embeddings, shift, TEST)
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
    return Findings([mean, *scores], {"rows": rows, "testbed": testbed})


class Common(NamedTuple):
    """The c classes that a shift and its reference set have in common.

    Attributes:
      groups: class ids in the reference set, for each common class.
      of_reference, of_shift: id of the common class, by class id in either set.
    """

    groups: list[Sequence[int]]
    of_reference: Mapping[int, int]
    of_shift: Mapping[int, int]

    @classmethod
    def of(cls, shift: Dataset, reference: Dataset) -> "Common":
        """Finds the common classes of a shift and its reference set."""
        own = shift.base_classes or tuple((i,) for i in range(len(reference.class_names)))
        common = [(label, group) for label, group in enumerate(own) if group]
        return cls(
            groups=[group for _, group in common],
            of_reference={old: new for new, (_, group) in enumerate(common) for old in group},
            of_shift={label: new for new, (label, _) in enumerate(common)},
        )

    def judge(
        self, scores: np.ndarray, targets: np.ndarray, numbers: Mapping[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Selects the examples of the common classes, and restricts scores to these classes.

        Args:
          scores: [n, classes of the reference set].
          targets: class ids in one of the two sets, int [n].
          numbers: `of_reference` or `of_shift`.

        Returns:
          Scores [m, c] and targets [m], ids of common classes.
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
    """Reads the accuracies of other models, whose trend is the baseline of robustness.

    Args:
      path: path of a .csv file with columns model, dataset, reference and shifted, the latter
        two as fractions; "": none.

    Returns:
      (reference, shifted) of each model, by data set.

    Raises:
      UserError: the file cannot be read, or is not such a table.
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
                raise ValueError(f"{pair} are not fractions between 0 and 1")
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
    splits=(TEST,),
    requires="a reference set with prompts beside shifts of it, and a model that can score text",
    supports=lambda context, dataset: (
        bool(shifts(context, dataset)) and recognizes(context, dataset)
    ),
    run=run,
    needs_features=True,
)
