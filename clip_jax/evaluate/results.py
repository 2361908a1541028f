"""What tasks find: scores for tables, and details for pages."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Score:
    """One number; fractions, but for counts.

    Attributes:
      task, dataset: what was done, on what.
      variant: of the task, such as "ensemble".
      metric: what was measured, such as "accuracy".
      value: of it.
      low, high: its confidence interval; None: none is known.
      n: examples it was measured on.
      chance: what guessing reaches; None: not known.
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


class Found(NamedTuple):
    """What a task returns: scores, the one to quote first; and details, as `to_json` takes them."""

    scores: Sequence[Score]
    details: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a task found on a data set.

    Attributes:
      task, dataset: their names.
      title: of the data set, for people.
      base: the data set that it is a shift of; "": none.
      made_of: a checksum of everything it depends on.
      scores: for tables; the first is the one to quote.
      details: for the page, as JSON can hold them.
      seconds: that it took, embeddings that were there already not included.
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
        return self.scores[0]

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
    """Of anything that `to_json` can write, hexadecimal."""
    return hashlib.sha256(to_json(values).encode()).hexdigest()[:24]


def to_json(values: Any) -> str:
    """As JSON, which has no NaN and no infinity: both become null."""
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
