"""The checkpoints of a workdir: saved in the background, found, restored.

A resume takes the newest that can be read, and moves damaged ones out of the way.
"""

import contextlib
import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint.checkpoint_manager import METRIC_ITEM_NAME

from clip_jax import checksums
from clip_jax.checkpoint import reading, together
from clip_jax.checkpoint.manager import open_manager
from clip_jax.checkpoint.writes import Writes, remove_unfinished
from clip_jax.common import hosts
from clip_jax.errors import StorageError, UserError
from clip_jax.state import TrainState
from clip_jax.storage import faults, for_orbax, locations, remote, writing

DIRECTORY = "checkpoints"  # inside the workdir
# Inside the workdir too, and not in the former: there orbax takes what it does not know for
# checkpoints that are half written.
DAMAGED = "damaged"


def split_path(path: epath.PathLike) -> tuple[epath.Path, int | None]:
    """Returns the workdir and step of a checkpoint's path; of any other, the path and None."""
    path = locations.parse(path)
    if path.parent.name == DIRECTORY and path.name.isdecimal():
        return path.parent.parent, int(path.name)
    return path, None


class Restored(NamedTuple):
    """A checkpoint that a run resumes from.

    Attributes:
      step: step after which it was saved.
      meta: description saved with it.
      state: training state.
    """

    step: int
    meta: dict[str, Any]
    state: TrainState


def _log(step: int, text: str) -> None:
    logging.warning("Step %d: %s", step, text)


def _score(metric: str, metrics: Mapping[str, float]) -> float:
    """Returns the metric by which checkpoints are ranked; the lowest of all where it is missing."""
    return metrics.get(metric, -math.inf)


class Checkpoints:
    """The checkpoints of one workdir; close it, or the last save may be lost.

    Attributes:
      directory: folder of the checkpoints, one folder per step.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        keep: int = 1,
        best_metric: str = "",
        give_up_after: float = 3600.0,
        report: Callable[[int, str], None] = _log,
        create: bool = True,
    ):
        """Opens the workdir.

        Args:
          workdir: local, gs:// or s3://.
          keep: number of most recent checkpoints to keep.
          best_metric: metric whose best checkpoint is kept too; "": none.
          give_up_after: seconds for which saves may fail before one raises StorageError.
          report: takes a step and a sentence about a damaged checkpoint or saves that fail.
          create: whether to write: creates the directory, and removes what a killed run left.
        """
        for_orbax.prepare()
        together.prepare()
        path = locations.parse(workdir)
        if not remote.is_remote(path):  # orbax refuses relative paths
            path = epath.Path(os.path.abspath(path))
        self.directory = path / DIRECTORY
        self._best_metric = best_metric
        self._score = functools.partial(_score, best_metric)
        self._report = report
        self._writes = Writes(self.directory, give_up_after, report)
        self._begun = False  # whether the last save was begun
        self._error: Exception | None = None  # of the last save, on this host
        if create and jax.process_index() == 0:
            remove_unfinished(self.directory)
        best = self._score if best_metric else None
        self._manager = faults.repeat(
            lambda: open_manager(self.directory, keep=keep, best=best, create=create),
            self.directory,
        )
        self._best = self._best_kept()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_):
        # The error of a save that is under way must not hide the one that ends the run.
        if kind and jax.process_count() > 1:
            return  # it would wait for hosts that wait for this one
        with contextlib.suppress(*([Exception] if kind else [])):
            self.close()

    def save(
        self, state: TrainState, step: int, meta: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> None:
        """Starts writing in the background as soon as the arrays are copied off the devices.

        Args:
          state: state to write; may be donated as soon as this returns.
          step: step of the state.
          meta: JSON-serialisable description of the run.
          metrics: metrics of this step; they rank the checkpoint if the best metric is among them.

        Raises:
          UserError: an array holds NaN or infinity; nothing is written then.
        """
        items = reading.items(state)
        inspected = checksums.inspect(items)
        if inspected.not_finite:
            raise UserError(self._poisoned(step, inspected.not_finite))
        rank = self._rank(metrics)
        self._best = max(self._best, *rank.values(), -math.inf)
        args = ocp.args.Composite(
            **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
            meta=ocp.args.JsonSave(reading.describe(step, meta, inspected.checksums)),
        )
        self._collect()
        self._agree()
        self._begun = False
        if self._writes.lost:  # threads of that save may have gone on, and failed too
            with contextlib.suppress(Exception):
                self._manager.check_for_errors()
            self._remove_unfinished()
        try:
            self._manager.save(step, args=args, metrics=rank)
        except Exception as error:
            self._failed(error)
        else:
            self._begun, self._error = True, None
            self._writes.begin(step, self._manager.is_saving_in_progress)

    def _rank(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Returns those metrics that rank a checkpoint: the best one, if it is among them."""
        return {k: float(v) for k, v in metrics.items() if k == self._best_metric}

    def rank(self, step: int, metrics: Mapping[str, float]) -> None:
        """Ranks a checkpoint by an evaluation that came after its save; every host must call it."""
        if not (rank := self._rank(metrics)):
            return
        if jax.process_index() == 0:
            try:
                writing.write(
                    self.directory / str(step) / METRIC_ITEM_NAME / METRIC_ITEM_NAME,
                    json.dumps(rank),
                )
            except (OSError, StorageError) as error:  # without it the run goes on as well
                self._report(
                    step,
                    f"The checkpoint of step {step:,} does not count as the best, since its "
                    f"{self._best_metric} could not be written: {faults.explain(error)}",
                )
        hosts.gather("ranked")
        self._manager.reload()
        self._best = self._best_kept()

    def _best_kept(self) -> float:
        """Reads the highest value of the best metric, of all checkpoints.

        Not later: other hosts might see a save that is under way, or not.
        """
        kept = [self._manager.metrics(step) for step in self._manager.all_steps()]
        return max((self._score(metrics or {}) for metrics in kept), default=-math.inf)

    def improves(self, metrics: Mapping[str, float]) -> bool:
        """Returns whether the best metric is among these, and above that of all checkpoints."""
        return self._score(metrics) > self._best

    def finish(self, hurry: bool = False) -> bool:
        """Waits for the save in progress; False: it failed and has to be repeated.

        Args:
          hurry: give up soon, since the process is about to be killed.

        Raises:
          StorageError: saves have failed for too long.
        """
        if hurry:
            self._writes.hurry()
        self._collect()
        self._agree()
        self._writes.pause()
        return not self._writes.lost

    def lost(self) -> bool:
        """Returns whether the last save failed and the state should be saved again.

        Hosts need not call it together, and may find out one after the other.

        Raises:
          StorageError: saves have failed for too long.
        """
        if self._begun and self._manager.is_saving_in_progress():  # stays so where none was begun
            return False
        self._collect()
        return self._writes.retry_due()

    def _collect(self) -> None:
        """Waits for the save in progress, if there is one, and records how it ended."""
        if not self._begun:
            return
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            self._failed(error)
        else:
            if self._writes.failing:  # threads of the failed save may have gone on after its end
                self._remove_unfinished()
            self._writes.succeeded()

    def _agree(self) -> None:
        """Has the last save count as failed on all hosts, where it has failed on one."""
        if jax.process_count() > 1:
            error = together.agree("end", self._error)
            if error is not None and self._error is None:
                self._failed(error)

    def _failed(self, error: Exception) -> None:
        self._begun, self._error = False, error
        self._manager.undo()
        self._remove_unfinished()
        self._writes.failed(error)

    def _remove_unfinished(self) -> None:
        """Makes space on a disk; in a bucket, which has no end, the next start does it."""
        if not remote.is_remote(self.directory) and jax.process_index() == 0:
            with contextlib.suppress(OSError):  # the save that failed tells more
                remove_unfinished(self.directory)

    def latest_step(self) -> int | None:
        """Returns the step of the most recent complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def discard_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, which the run has gone back from."""
        self.finish()
        for later in [other for other in self.steps() if other > step]:
            faults.repeat(functools.partial(self._manager.delete, later), self.directory)
        self._best = self._best_kept()

    def read_meta(self, step: int) -> dict[str, Any]:
        """Reads the description saved with a checkpoint."""
        return self._read(step)["meta"]

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Reads a training state onto the mesh of `like`, whatever mesh it was saved from.

        Every host must call it.

        Args:
          step: step of the checkpoint.
          like: shapes, dtypes and shardings, as from `state.abstract_state`.

        Raises:
          UserError: the checkpoint is incomplete, damaged, of another model, or in another
            precision.
        """
        try:
            return self._restore(step, like).state
        except reading.Unreadable as error:
            raise UserError(self._unreadable(step, error)) from error

    def restore_latest(self, like: TrainState, last: int | None = None) -> Restored:
        """Reads the newest checkpoint that is whole, and moves damaged ones into `DAMAGED`.

        Every host must call it, and all of them take the same checkpoint.

        Args:
          like: as for `restore`.
          last: the last step to be considered; None: that of the newest checkpoint.

        Raises:
          UserError: there is none, or all are unreadable; nothing is moved then.
          StorageError: the storage fails, which says nothing about the checkpoints.
        """
        errors: dict[int, UserError] = {}
        for step in reversed([step for step in self.steps() if last is None or step <= last]):
            try:
                found = self._restore(step, like)
            except (reading.Unreadable, reading.OtherPrecision) as error:
                errors[step] = error
                continue
            for damaged, error in errors.items():
                self._set_aside(damaged, step, error)
            return found
        for error in errors.values():  # of the newest
            if isinstance(error, reading.OtherPrecision):
                raise error
            break
        if len(errors) == 1:
            raise UserError(self._unreadable(*errors.popitem()))
        reasons = "; ".join(f"that of step {step}, {error}" for step, error in errors.items())
        raise UserError(
            f"None of the {len(errors)} checkpoints in {self.directory} can be read: {reasons}. "
            "Put back settings that were changed, or the folders from a copy; to start afresh, "
            f"take another --workdir or delete {self.directory}."
        )

    def _restore(self, step: int, like: TrainState) -> Restored:
        folder = self.directory / str(step)

        def read() -> dict[str, Any]:
            reading.check_precision(folder, self._item_metadata(step), like)
            wanted = reading.items(like).items()
            return reading.read(
                folder, **{name: ocp.args.StandardRestore(part) for name, part in wanted}
            )

        items = reading.agreed(read)
        reading.agreed(lambda: reading.verify(items))
        meta = items.pop("meta")
        return Restored(step, meta, reading.to_state(items))

    def _item_metadata(self, step: int) -> Any:
        try:
            with reading.without_warnings():  # it warns that this reads no arrays
                return self._manager.item_metadata(step)
        except Exception:  # damaged: reading the items will tell
            return None

    def _set_aside(self, step: int, instead: int, error: UserError) -> None:
        """Moves a damaged checkpoint out of the way of the next save of its step."""
        source, place = self.directory / str(step), self.directory.parent / DAMAGED
        if jax.process_index() == 0:
            names = (f"{step}-{n}" if n else str(step) for n in itertools.count())
            target = next(place / name for name in names if not (place / name).exists())
            writing.move_folder(source, target)
            self._report(
                instead,
                f"The checkpoint of step {step:,} cannot be read: {error}. The run resumes from "
                f"that of step {instead:,}, and the {step - instead:,} steps after it are trained "
                f"again. The damaged one was moved to {target}; it can be deleted.",
            )
        hosts.gather("moved")
        self._manager.reload()
        self._best = self._best_kept()

    def restore_variables(
        self, step: int, like: Mapping[str, Any], ema: bool = False
    ) -> dict[str, Any]:
        """Reads the variables alone, for inference.

        Args:
          step: step of the checkpoint.
          like: as `TrainState.variables`.
          ema: whether to read the moving average of the parameters in their place.
        """
        found = self._read(step, model=ocp.args.StandardRestore(like))["model"]
        if ema:
            average = ocp.args.StandardRestore({"params": like["params"]})
            found |= self._read(step, ema=average)["ema"]
        return found

    def close(self) -> None:
        """Waits for pending writes."""
        self._writes.close()
        self._manager.close()

    def _read(self, step: int, **args: Any) -> dict[str, Any]:
        """Reads items of a checkpoint, and compares them with their checksums."""
        try:
            items = reading.read(self.directory / str(step), **args)
            reading.verify(items)
        except reading.Unreadable as error:
            raise UserError(self._unreadable(step, error)) from error
        return items

    def _unreadable(self, step: int, reason: UserError) -> str:
        earlier = max((s for s in self._manager.all_steps() if s < step), default=None)
        instead = f"resume from step {earlier}" if earlier is not None else "start afresh"
        return (
            f"The checkpoint {self.directory / str(step)} cannot be read: {reason}. To {instead}, "
            "delete that folder and run the same command again."
        )

    def _poisoned(self, step: int, names: list[str]) -> str:
        return (
            f"After step {step} {len(names)} arrays of the training state hold NaN or infinity, "
            f"such as {names[0]}, so no checkpoint of it is written. {self.way_back()}"
        )

    def way_back(self) -> str:
        """Returns sentences about how to go on after a run has diverged."""
        remedy = (
            "a lower --config.optim.learning_rate, a longer --config.optim.warmup or a bound such "
            "as --config.optim.grad_clip_norm=1.0"
        )
        last = self.latest_step()
        if last is None:
            return f"Run again with {remedy}, in another --workdir."
        return (
            f"The last good checkpoint is that of step {last}. To go on from there, run the same "
            f"command with {remedy}, and --config.checkpoint.allow_config_change=True; to begin "
            "anew, take another --workdir."
        )
