"""Evaluations on disk.

A directory holds
    results/TASK-DATASET.json   one for each task and data set, whole or not there
    results.json                all of them, with the model and the settings
    results.csv                 their scores, a row each
"""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from clip_jax.errors import UserError
from clip_jax.evaluate.results import Result, Score, to_json
from clip_jax.storage import locations, ranges, writing

ALL, TABLE, _FOLDER = "results.json", "results.csv", "results"


@dataclasses.dataclass(frozen=True)
class About:
    """The model that was evaluated.

    Attributes:
      name: of its architecture, such as "ViT-B/32".
      source: where its weights come from.
      parameters: number of them.
      image_flops: operations to embed one image; multiplications and additions count apart.
      images_seen: pairs that it was trained on, repeated ones counted again; 0: not known.
      train_flops: operations of that training; 0: not known.
    """

    name: str
    source: str
    parameters: int
    image_flops: float
    images_seen: int = 0
    train_flops: float = 0.0


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Everything that was found about one model.

    Attributes:
      model: which.
      settings: that the results depend on.
      results: of each task on each data set.
      missing: data sets that could not be evaluated, and why.
      finished: date and time, ISO 8601.
    """

    model: About
    settings: Mapping[str, Any]
    results: tuple[Result, ...]
    missing: Mapping[str, str]
    finished: str

    def of(self, task: str) -> list[Result]:
        """The results of a task."""
        return [result for result in self.results if result.task == task]

    def scores(self) -> Iterable[Score]:
        """All of them."""
        return (score for result in self.results for score in result.scores)


def read_evaluation(directory: epath.PathLike) -> Evaluation:
    """What `Folder.write_all` wrote.

    Raises:
      UserError: there is none, or it is damaged.
    """
    path = locations.parse(directory) / ALL
    try:
        text = ranges.read(path)
    except FileNotFoundError:
        raise UserError(
            f"There is no evaluation in {directory}: make one by python -m clip_jax evaluate "
            f"--checkpoint=RUN --out={directory}"
        ) from None
    try:
        fields = json.loads(text)
        return Evaluation(
            **fields
            | {
                "model": About(**fields["model"]),
                "results": tuple(map(Result.from_json, fields["results"])),
            }
        )
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read as an evaluation ({error}): evaluate the model again."
        ) from None


class Folder:
    """A directory of results."""

    def __init__(self, directory: epath.PathLike):
        self.directory = locations.parse(directory)

    def read(self, task: str, dataset: str, made_of: str) -> Result | None:
        """What is there already; None: nothing, or something made of something else."""
        try:
            found = Result.from_json(json.loads(ranges.read(self._path(task, dataset))))
        except FileNotFoundError:
            return None
        return found if found.made_of == made_of else None

    def write(self, result: Result) -> None:
        """Keeps a result, whole or not at all."""
        path = self._path(result.task, result.dataset)
        writing.write(path, to_json(dataclasses.asdict(result)))

    def write_all(self, evaluation: Evaluation) -> None:
        """Writes results.json and results.csv."""
        writing.write(self.directory / ALL, to_json(dataclasses.asdict(evaluation)))
        names = [field.name for field in dataclasses.fields(Score)]
        file = io.StringIO()
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(score) for score in evaluation.scores())
        writing.write(self.directory / TABLE, file.getvalue())

    def _path(self, task: str, dataset: str) -> epath.Path:
        return self.directory / _FOLDER / f"{task}-{dataset}.json"
