"""The results of tasks: scores for tables, details for pages, and the files that hold them.

A directory of results holds
    results/TASK-DATASET.json   a file for each task and data set, written atomically
    results.json                all results, with the model and the settings
    results.csv                 all scores, one per row
"""

import csv
import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from clip_jax.errors import UserError
from clip_jax.storage import locations, ranges, writing

ALL, TABLE, _FOLDER = "results.json", "results.csv", "results"


@dataclasses.dataclass(frozen=True)
class Score:
    """One number, a fraction unless it counts something.

    Attributes:
      task, dataset: names of the task and of the data set.
      variant: variant of the task, such as "ensemble".
      metric: name of the number, such as "accuracy".
      value: the number.
      low, high: confidence interval; None: not known.
      n: number of examples it was measured on.
      chance: value that guessing reaches; None: not known.
    """

    task: str
    dataset: str
    variant: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    n: int = 0
    chance: float | None = None


class Findings(NamedTuple):
    """The output of a task.

    Attributes:
      scores: scores for tables; the first is the one to quote.
      details: contents of a page, as `to_json` takes them.
    """

    scores: Sequence[Score]
    details: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a task on a data set.

    Attributes:
      task, dataset: names of the task and of the data set.
      title: title of the data set, for people.
      base: name of the data set that it is a shift of; "": none.
      made_of: checksum of everything that it depends on; "": not known.
      scores: scores for tables; the first is the one to quote.
      details: contents of the page, as JSON can hold them.
      seconds: time that it took, without embeddings that existed before.
    """

    task: str
    dataset: str
    title: str
    base: str
    made_of: str
    scores: tuple[Score, ...]
    details: Mapping[str, Any]
    seconds: float

    @property
    def headline(self) -> Score:
        """The score to quote."""
        return self.scores[0]

    @property
    def logged_scores(self) -> tuple[Score, ...]:
        """The scores of the headline's variant, such as every recall for plain captions."""
        return tuple(score for score in self.scores if score.variant == self.headline.variant)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Result":
        known: dict[str, Any] = {**fields, "scores": tuple(map(_score, fields["scores"]))}
        return cls(**known)


def _score(fields: Mapping[str, Any]) -> Score:
    known: dict[str, Any] = {**fields}
    if known["value"] is None:  # JSON has no NaN
        known["value"] = math.nan
    return Score(**known)


def fingerprint(values: Mapping[str, Any]) -> str:
    """Computes a checksum of anything that `to_json` can write, hexadecimal."""
    return hashlib.sha256(to_json(values).encode()).hexdigest()[:24]


def to_json(values: Any) -> str:
    """Writes values as JSON, with null in place of NaN and infinity, which JSON lacks."""
    return json.dumps(_plain(values), indent=1, allow_nan=False, sort_keys=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@dataclasses.dataclass(frozen=True)
class About:
    """The model that was evaluated.

    Attributes:
      name: name of its architecture, such as "ViT-B/32".
      source: origin of its weights.
      parameters: number of parameters.
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
    """The evaluation of one model.

    Attributes:
      model: the model.
      settings: settings that the results depend on.
      results: result of each task on each data set.
      missing: reason by name, for everything that could not be evaluated.
      finished: date and time, ISO 8601.
    """

    model: About
    settings: Mapping[str, Any]
    results: tuple[Result, ...]
    missing: Mapping[str, str]
    finished: str

    def of(self, task: str) -> list[Result]:
        """Returns the results of a task."""
        return [result for result in self.results if result.task == task]

    def scores(self) -> Iterable[Score]:
        """Yields the scores of all results."""
        return (score for result in self.results for score in result.scores)


def read_evaluation(directory: epath.PathLike) -> Evaluation:
    """Reads what `Folder.write_all` wrote.

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
        """Reads a result; None: there is none, or one made of something else, or damaged."""
        try:
            found = Result.from_json(json.loads(ranges.read(self._path(task, dataset))))
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        return found if found.made_of == made_of else None

    def write(self, result: Result) -> None:
        """Writes a result, whole or not at all."""
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
