"""Orbax checkpoints: asynchronous, sharded, the most recent ones and the best.

A checkpoint has three items: "model" (parameters and BatchNorm statistics; inference reads no
more), "optimizer", and "meta" (JSON: step, position in the data, config, tokenizer, checksums of
the arrays and of itself). What is read is compared with its checksums.
"""

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from clip_jax import checksums
from clip_jax.errors import ExitCode, StorageError, UserError
from clip_jax.sharding import path_name
from clip_jax.state import TrainState
from clip_jax.storage import faults, for_orbax, locations, remote

DIRECTORY = "checkpoints"  # inside the workdir

_LEAST_SLICE = 2**20  # bytes
_OWN = "checksum"  # the field of "meta" with the checksum of all others


def _leave_small_arrays_whole() -> None:
    """Registers a handler that saves small arrays without slicing them.

    By default orbax slices every replicated array into a part for each device, with a program for
    each slice: in a small model these programs take longer to compile than everything else.
    """
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_LEAST_SLICE)
    with _without_warnings():  # it warns that there was another handler
        ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


_leave_small_arrays_whole()


def split_path(path: epath.PathLike) -> tuple[epath.Path, int | None]:
    """Returns the workdir and step of a checkpoint's path; of any other, the path and None."""
    path = locations.parse(path)
    if path.parent.name == DIRECTORY and path.name.isdecimal():
        return path.parent.parent, int(path.name)
    return path, None


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
        create: bool = True,
    ):
        """Opens the workdir.

        Args:
          workdir: local, gs:// or s3://.
          keep: number of most recent checkpoints to keep.
          best_metric: metric whose best checkpoint is kept too; "": none.
          create: whether to create the directory if there is none.
        """
        for_orbax.prepare()
        path = locations.parse(workdir)
        if not remote.is_remote(path):  # orbax refuses relative paths
            path = epath.Path(os.path.abspath(path))
        self.directory = path / DIRECTORY
        policies: list[preservation_policy.PreservationPolicy] = [preservation_policy.LatestN(keep)]

        def score(metrics: Mapping[str, float]) -> float:
            return metrics.get(best_metric, -math.inf)

        if best_metric:
            best = preservation_policy.BestN(
                get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False
            )
            policies.append(best)
        self._best_metric = best_metric
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            # The policy decides; but without this the metrics are not written, and a resumed run
            # would not know its best.
            best_fn=score if best_metric else None,
            enable_async_checkpointing=True,
            create=create,
        )
        self._writes = _Writes(self.directory)
        try:
            self._manager = faults.repeat(
                lambda: ocp.CheckpointManager(self.directory, options=options), self.directory
            )
        except UserError:
            raise
        except ValueError as error:  # it reads the metrics of all checkpoints
            raise UserError(
                f"A checkpoint in {self.directory} is damaged: its metrics cannot be read "
                f"({_first_line(error)}). Delete the folder of that step, in which metrics/metrics "
                "is cut short, and run the same command again."
            ) from error

        # Not read again: other hosts might see a save that is under way, or not.
        kept = [self._manager.metrics(step) for step in self._manager.all_steps()]
        self._best = max((score(metrics or {}) for metrics in kept), default=-math.inf)

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
        items = {"model": state.variables, "optimizer": _progress(state)}
        inspected = checksums.inspect(items)
        if inspected.not_finite:
            raise UserError(self._poisoned(step, inspected.not_finite))
        described = {"step": step, **meta, "checksums": inspected.checksums}
        # As JSON gives it back, which knows no tuples and no numbers as keys.
        described = json.loads(json.dumps(described))
        described[_OWN] = checksums.of_json(described)
        rank = {k: float(v) for k, v in metrics.items() if k == self._best_metric}
        self._best = max(self._best, *rank.values(), -math.inf)
        args = ocp.args.Composite(
            **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
            meta=ocp.args.JsonSave(described),
        )
        while True:
            try:
                self._manager.save(step, args=args, metrics=rank)
                return self._writes.begin(step, self._manager.is_saving_in_progress)
            except Exception as error:  # an error of this save, or of the one before
                self._writes.failed(error)
                self._writes.pause()

    def improves(self, metrics: Mapping[str, float]) -> bool:
        """Returns whether the best metric is among these, and above that of all checkpoints."""
        return metrics.get(self._best_metric, -math.inf) > self._best

    def finish(self) -> bool:
        """Waits for the save in progress; False: it failed and has to be repeated.

        Raises:
          StorageError: it has failed for `faults.RETRY_FOR` seconds.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            self._writes.failed(error)
            self._writes.pause()
            return False
        self._writes.succeeded()
        return True

    def lost(self) -> bool:
        """Returns whether the last save failed and the state should be saved again."""
        if self._manager.is_saving_in_progress():
            return False
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            self._writes.succeeded()
        except Exception as error:
            self._writes.failed(error)
        return self._writes.retry_due()

    def latest_step(self) -> int | None:
        """Returns the step of the most recent complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def read_meta(self, step: int) -> dict[str, Any]:
        """Reads the description saved with a checkpoint."""
        return self._read(step)["meta"]

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Reads a training state onto the mesh of `like`, whatever mesh it was saved from.

        Args:
          step: step of the checkpoint.
          like: shapes, dtypes and shardings, as from `state.abstract_state`.

        Raises:
          UserError: the checkpoint is incomplete, damaged, of another model, or in another
            precision.
        """
        self._check_precision(step, like)
        items = self._read(
            step,
            model=ocp.args.StandardRestore(like.variables),
            optimizer=ocp.args.StandardRestore(_progress(like)),
        )
        return TrainState(**items["model"], **items["optimizer"])

    def _check_precision(self, step: int, like: TrainState) -> None:
        """Raises UserError where arrays would be cast, which loses precision or feigns it."""
        try:
            with _without_warnings():  # it warns that this reads no arrays
                stored = self._manager.item_metadata(step)
            saved = {**_dtypes(stored["model"]), **_dtypes(stored["optimizer"])}
        except Exception:  # damaged: reading it will tell
            return
        wanted = {**_dtypes(like.variables), **_dtypes(_progress(like))}
        other = [name for name, dtype in wanted.items() if saved.get(name, dtype) != dtype]
        if other:
            name = other[0]
            raise UserError(
                f"The checkpoint {self.directory / str(step)} keeps {len(other)} arrays in another "
                f"precision than the config, such as {name} in {saved[name]} instead of "
                f"{wanted[name]}: set --config.optim.moment_dtype and --config.optim.bf16_params "
                "to what the run began with, or start from its model alone, with "
                "--config.init_from, in another --workdir."
            )

    def restore_variables(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the variables alone, for inference; `like` as `TrainState.variables`."""
        return self._read(step, model=ocp.args.StandardRestore(like))["model"]

    def close(self) -> None:
        """Waits for pending writes."""
        self._writes.close()
        self._manager.close()

    def _read(self, step: int, **args: Any) -> Any:
        """Reads items of a checkpoint, and compares them with their checksums."""
        try:
            items = self._manager.restore(
                step, args=ocp.args.Composite(meta=ocp.args.JsonRestore(), **args)
            )
        except Exception as error:  # whatever a damaged file makes of the libraries below
            logging.debug("Restoring failed", exc_info=True)
            reason = f"it is incomplete, damaged, or of another model ({_first_line(error)})"
            raise UserError(self._unreadable(step, reason)) from error
        meta = items["meta"]
        own = meta.pop(_OWN, None)
        if own is None:  # of a version that wrote none
            return items
        if own != checksums.of_json(meta):
            raise UserError(self._unreadable(step, "its meta/metadata is damaged"))
        saved = meta.pop("checksums")
        arrays = {name: items[name] for name in args}
        if not arrays:
            return items
        inspected = checksums.inspect(arrays)
        if damaged := [name for name, n in inspected.checksums.items() if saved.get(name) != n]:
            reason = (
                f"{len(damaged)} of {len(inspected.checksums)} arrays are not what was saved, such "
                f"as {damaged[0]}, so that a file of it is damaged"
            )
            raise UserError(self._unreadable(step, reason))
        return items

    def _unreadable(self, step: int, reason: str) -> str:
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


class _Writes:
    """Monitors saves: logs those that take long, decides on retries, and gives up in the end."""

    _LOG_EVERY = 60.0  # seconds
    _LONGEST_WAIT = 30.0  # seconds between two tries

    def __init__(self, directory: epath.Path):
        self._directory = directory
        self._failing_since: float | None = None
        self._wait = 0.0  # seconds between two tries
        self._retry_at: float | None = None  # None: nothing is lost
        self._done = threading.Event()

    def begin(self, step: int, busy: Callable[[], bool]) -> None:
        """Watches a save until it is no longer `busy`."""
        self.succeeded()  # the one before, or this one would not have begun
        self._retry_at = None
        self._done.set()
        self._done = done = threading.Event()

        def watch() -> None:
            began = logged = time.monotonic()
            while not done.wait(1.0) and busy():
                if jax.process_count() > 1 and for_orbax.failures:
                    # The main thread and the other hosts wait for this part of the checkpoint.
                    print(
                        f"\n{self._sentence(for_orbax.failures[-1])}", file=sys.stderr, flush=True
                    )
                    os._exit(ExitCode.RESUME)
                if (now := time.monotonic()) - logged < self._LOG_EVERY:
                    continue
                logged = now
                failures = ", ".join(f"{n} x {name}" for name, n in faults.counts().items())
                logging.warning(
                    "The checkpoint of step %d is not in %s yet, after %.0f s; failures of storage "
                    "so far: %s",
                    step,
                    self._directory,
                    now - began,
                    failures or "none seen",
                )

        threading.Thread(target=watch, name="checkpoint watch", daemon=True).start()

    def failed(self, error: Exception) -> None:
        """Records a failure; raises it if it is not of storage, or has lasted too long."""
        self._done.set()
        if not (remote.is_remote(self._directory) and faults.is_failure(error)):
            raise error
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        self._wait = min(max(2 * self._wait, 1.0), self._LONGEST_WAIT)
        self._retry_at = now + self._wait
        faults.record(f"{faults.reason(error)} while saving", self._directory, _first_line(error))
        if jax.process_count() > 1 or now - self._failing_since > faults.RETRY_FOR:
            raise StorageError(self._sentence(error)) from error

    def _sentence(self, error: BaseException) -> str:
        return (
            f"A checkpoint could not be written to {self._directory}: {faults.explain(error)} The "
            "same command resumes at the last complete one."
        )

    def succeeded(self) -> None:
        """Records that the save is written, unless it failed and was not begun again."""
        if self._retry_at is None:
            self._failing_since, self._wait = None, 0.0

    def retry_due(self) -> bool:
        """Returns whether a save failed, long enough ago to try again."""
        return self._retry_at is not None and time.monotonic() >= self._retry_at

    def pause(self) -> None:
        """Sleeps until the next try."""
        if self._retry_at is not None:
            time.sleep(max(0.0, self._retry_at - time.monotonic()))

    def close(self) -> None:
        self._done.set()


def _dtypes(tree: Any) -> dict[str, str]:
    """Returns the dtypes by path, of arrays, shapes or orbax's metadata."""
    tree = getattr(tree, "tree", tree)
    return {path_name(path): str(leaf.dtype) for path, leaf in jax.tree.leaves_with_path(tree)}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def _progress(state: TrainState) -> dict[str, Any]:
    """Returns the part of the state that only training needs."""
    return {"step": state.step, "opt_state": state.opt_state}
