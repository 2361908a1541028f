"""The facts of a model card: the model, and its training where that was recorded."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from clip_jax import checkpoint
from clip_jax.common import metrics
from clip_jax.errors import UserError
from clip_jax.models import Size
from clip_jax.weights.model import Weights

_ROWS = 8  # in the training curve
_FEW = 4  # evaluations that make a curve by themselves
# Scores of the data that the config describes; those of data sets by name are not told apart here.
_SCORE = re.compile(r"zeroshot/top\d|retrieval/(text_to_image|image_to_text)/recall@\d+")

Row = Mapping[str, float | int]


@dataclasses.dataclass(frozen=True)
class Training:
    """The training that led to a checkpoint.

    Attributes:
      step: step of the checkpoint.
      images_seen: pairs, repeated ones counted again.
      seconds: duration of all runs up to it.
      hardware: number and kind of the devices; "": not recorded.
      pairs: size of the data; 0: not recorded.
      skipped: unusable examples by reason.
      truncated: captions cut to the context length.
      config: the resolved config.
      curve: some rows of metrics.jsonl, train and evaluation of a step in one, oldest first.
      scores: results of the last evaluation, by names such as "zeroshot/top1"; fractions.
      scored_at: step of that evaluation; 0: there was none.
    """

    step: int
    images_seen: int
    seconds: float
    hardware: str
    pairs: int
    skipped: Mapping[str, int]
    truncated: int
    config: Mapping[str, Any]
    curve: Sequence[Row]
    scores: Row
    scored_at: int


@dataclasses.dataclass(frozen=True)
class Record:
    """The facts that a card states.

    Attributes:
      size: shapes and forms of the model.
      parameters: number of trainable values.
      tokenizer: identity of its tokenizer; "": not known.
      origin: origin of the weights, as in `Weights`.
      training: None: these weights were converted, not trained here.
    """

    size: Size
    parameters: int
    tokenizer: str
    origin: Mapping[str, Any]
    training: Training | None


def read(weights: Weights) -> Record:
    """Collects the facts of a model.

    Raises:
      UserError: the checkpoint is damaged, or of a model that does not embed texts.
    """
    if weights.size.objective != "contrastive":
        raise UserError(
            f"Exports and model cards are for models with an image and a text tower; "
            f"{weights.origin['source']} was trained for {weights.size.objective}. clip_jax.load "
            "uses it as it is, and `python -m clip_jax convert` copies it."
        )
    return Record(
        size=weights.size,
        parameters=weights.parameters,
        tokenizer=weights.tokenizer.identity,
        origin=weights.origin,
        training=read_training(weights.origin),
    )


def read_training(origin: Mapping[str, Any]) -> Training | None:
    """Reads how weights of this origin were trained; None: they were converted."""
    workdir, _ = checkpoint.split_path(origin["source"])
    if "step" not in origin or not (workdir / checkpoint.DIRECTORY).is_dir():
        return None
    with checkpoint.Checkpoints(workdir, create=False) as store:
        meta = store.read_meta(origin["step"])
    rows = _by_step(metrics.read_history(workdir), meta["step"])
    evaluated = [row for row in rows if any(map(_SCORE.fullmatch, row))]
    last = evaluated[-1] if evaluated else {"step": 0}
    return Training(
        step=meta["step"],
        images_seen=meta["examples_seen"],
        seconds=meta["seconds"],
        hardware=meta.get("hardware", ""),
        pairs=meta.get("pairs", 0),
        skipped=meta["skipped"],
        truncated=meta["truncated"],
        config=meta["config"],
        curve=_curve(rows),
        scores={name: value for name, value in last.items() if _SCORE.fullmatch(name)},
        scored_at=int(last["step"]),
    )


def _by_step(history: Sequence[Row], last: int) -> list[Row]:
    """Merges all numbers of a step into one row; ascending, without steps after `last`."""
    merged: dict[float, dict[str, float | int]] = {}
    for row in history:
        if row["step"] <= last:
            merged.setdefault(row["step"], {}).update(row)
    return [merged[step] for step in sorted(merged)]


def _curve(rows: list[Row]) -> list[Row]:
    """Picks at most `_ROWS` rows with a loss, evenly spaced; evaluated ones if there are enough."""
    rows = [row for row in rows if "train/loss" in row]
    evaluated = [row for row in rows if any(map(_SCORE.fullmatch, row))]
    rows = evaluated if len(evaluated) >= _FEW else rows
    if len(rows) <= _ROWS:
        return rows
    return [rows[round(i * (len(rows) - 1) / (_ROWS - 1))] for i in range(_ROWS)]
