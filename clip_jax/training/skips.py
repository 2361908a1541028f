"""Skipped steps: their counts, their batches, and the bound on how many there may be in a row."""

import collections
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from clip_jax.errors import UserError
from clip_jax.storage import locations, writing
from clip_jax.training.run import list_counts

DIRECTORY = "skipped"  # inside the workdir

NONFINITE = "non-finite step"
SPIKE = "spike"

_LISTED = 5  # skipped steps that a line names
_LAG = 4  # steps that are under way when the outcome of one is asked for, so that no device idles


class RollBack(Exception):
    """More steps in a row were skipped than `step.max_skipped` allows.

    Attributes:
      first, last: the steps of the row, from the first to the one that was too many.
    """

    def __init__(self, first: int, last: int):
        super().__init__(f"steps {first:,} to {last:,} were skipped")
        self.first, self.last = first, last


@dataclasses.dataclass(frozen=True)
class SkippedStep:
    """One step that changed nothing; its loss and gradient norm say why."""

    step: int
    loss: float
    grad_norm: float

    @property
    def reason(self) -> str:
        """The name that it is counted under."""
        finite = math.isfinite(self.loss) and math.isfinite(self.grad_norm)
        return SPIKE if finite else NONFINITE

    def __str__(self) -> str:
        return f"step {self.step:,} (loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g})"


class Skips:
    """The skipped steps of a run. The device is asked about a step when some more are under way.

    All hosts see the same scalars, at the same steps, and so decide the same.

    Attributes:
      counts: skipped steps by reason, of the resumed runs too.
      in_a_row: those without a step between them that was applied, up to the last one read.
    """

    def __init__(
        self,
        max_in_a_row: int,
        saved_batches: int,
        *,
        counts: Mapping[str, int],
        in_a_row: int,
        note: Callable[[int, str], None],
        save: Callable[[int], str],
    ):
        """Begins where a run is resumed.

        Args:
          max_in_a_row: greatest number of skipped steps in a row.
          saved_batches: number of batches to save in the whole run, those of its first skips.
          counts: skipped steps of the resumed runs, by reason.
          in_a_row: the last ones of them in a row.
          note: shows and records a sentence about a step.
          save: saves the batch of a step; returns a description of the place.
        """
        self.counts, self.in_a_row = Counter(counts), in_a_row
        self._max_in_a_row, self._saved_batches = max_in_a_row, saved_batches
        self._note, self._save = note, save
        self._unread: collections.deque[tuple[int, list[jax.Array]]] = collections.deque()
        self._found: list[str] = []  # skipped steps that no line has named yet

    def record(self, step: int, values: Mapping[str, jax.Array]) -> None:
        """Keeps the outcome of a step, and counts an earlier one; nothing where none is skipped.

        Raises:
          RollBack: there are too many in a row.
        """
        if "skipped" not in values:
            return
        outcome = [values[name].addressable_data(0) for name in ("skipped", "loss", "grad_norm")]
        outcome[0].copy_to_host_async()
        self._unread.append((step, outcome))
        self._count(step - _LAG)

    def read(self, last: int) -> None:
        """Counts the skipped steps up to `last`, and shows those that are not shown yet.

        Raises:
          RollBack: there are too many in a row.
        """
        self._count(last)
        self._show(last)

    def _count(self, last: int) -> None:
        """Counts the skipped steps up to `last`, and saves their batches."""
        while self._unread and self._unread[0][0] <= last:
            step, outcome = self._unread.popleft()
            if not np.asarray(outcome[0]).item():
                self.in_a_row = 0
                continue
            self.in_a_row += 1
            skipped = SkippedStep(step, *(np.asarray(value).item() for value in outcome[1:]))
            self.counts[skipped.reason] += 1
            saved = self.counts.total() <= self._saved_batches
            self._found.append(f"{skipped}{self._save(step) if saved else ''}")
            if self.in_a_row > self._max_in_a_row:
                self._show(step)
                raise RollBack(step - self.in_a_row + 1, step)

    def _show(self, last: int) -> None:
        found, self._found = self._found, []
        if found:
            more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
            self._note(last, f"Skipped: {', '.join(found[:_LISTED])}{more}.")


def choose_checkpoint(
    steps: Sequence[int], first: int, rollbacks: Sequence[Mapping[str, int]]
) -> int | None:
    """Chooses the checkpoint to go back to; None if there is none.

    It is the last one from before the row of skipped steps. If the run has gone back to that one
    already, and saved none since, it is the one before: the model in it may be spoilt. A checkpoint
    from within the row holds the model from before the row, and serves where there is no other.

    Args:
      steps: steps of the checkpoints, ascending.
      first: first step of the row.
      rollbacks: roll-backs so far, as in a checkpoint's metadata.
    """
    before = [step for step in steps if step < first]
    if not before:
        return min(steps, default=None)
    tried = bool(rollbacks) and rollbacks[-1]["to_step"] == before[-1]
    return before[-2] if tried and len(before) > 1 else before[-1]


def give_up(
    found: RollBack,
    counts: Mapping[str, int],
    rollbacks: Sequence[Mapping[str, int]],
    config: ConfigDict,
    directory: epath.PathLike,
) -> UserError:
    """Returns the error of a run that may not, or cannot, go back once more."""
    if len(rollbacks) < config.max_rollbacks:
        why = "there is no checkpoint to go back to"
    else:
        before = f"; gone back {_list_rollbacks(rollbacks)}" if rollbacks else ""
        why = f"step.max_rollbacks = {config.max_rollbacks} allows no further roll-back{before}"
    saved = f" Batches of the first ones are in {epath.Path(directory) / DIRECTORY}."
    return UserError(
        f"Steps {found.first:,} to {found.last:,} were skipped, more in a row than "
        f"step.max_skipped = {config.max_skipped} allows, and {why}. Skipped in the whole run: "
        f"{list_counts(counts)}.{saved if config.saved_batches else ''} Run the same command with "
        "a lower --config.optim.learning_rate, a longer --config.optim.warmup or a bound such as "
        "--config.optim.grad_clip_norm=1.0, and --config.checkpoint.allow_config_change=True; "
        "where good steps were skipped as spikes, with a higher --config.step.max_grad_norm; or "
        f"to go on as before, with --config.step.max_rollbacks={len(rollbacks) + 3}."
    )


def notes(counts: Mapping[str, int], rollbacks: Sequence[Mapping[str, int]]) -> list[str]:
    """Returns sentences about the skipped steps of a run and its roll-backs, for its report."""
    if not counts:
        return []
    told = [f"Skipped steps: {list_counts(counts)}."]
    return [*told, f"Gone back {_list_rollbacks(rollbacks)}."] if rollbacks else told


def _list_rollbacks(rollbacks: Sequence[Mapping[str, int]]) -> str:
    return ", ".join(f"from step {r['from_step']:,} to {r['to_step']:,}" for r in rollbacks)


def batch_path(directory: epath.PathLike, step: int, part: int, parts: int) -> epath.Path:
    """Returns the file for one host's part of the batch of a skipped step."""
    which = f".part{part:04d}" if parts > 1 else ""
    return locations.parse(directory) / DIRECTORY / f"step_{step:07d}{which}.npz"


def save_batch(path: epath.Path, batch: Mapping[str, np.ndarray]) -> str:
    """Writes a batch, and describes the place; a failure does not end the run, it is told."""
    try:
        with writing.replacing(path) as local, local.open("wb") as file:
            arrays: Any = batch
            np.savez(file, **arrays)
    except (OSError, UserError) as error:
        return f"; its batch could not be saved: {error}"
    return f"; its batch is in {path}"
