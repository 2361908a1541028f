"""Orbax's manager of checkpoints, as this project wants it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from clip_jax.checkpoint import reading
from clip_jax.storage import faults, remote

_LEAST_SLICE = 2**20  # bytes


def _leave_small_arrays_whole() -> None:
    """Registers a handler that saves small arrays without slicing them.

    By default orbax slices every replicated array into a part for each device, with a program for
    each slice: in a small model these programs take longer to compile than everything else.
    """
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_LEAST_SLICE)
    with reading.without_warnings():  # it warns that there was another handler
        ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)


_leave_small_arrays_whole()


class Manager(ocp.CheckpointManager):
    """Orbax's manager, which outlives damaged metrics and saves that fail."""

    def save(self, step: int, *args: Any, **kwargs: Any) -> bool:
        self._before = list(self._checkpoints)
        return super().save(step, *args, **kwargs)

    def undo(self) -> None:
        """Restores the list of checkpoints to that before a save that failed.

        At the beginning of a save the manager strikes off those that its success will replace.
        """
        self._checkpoints.set(self._before)

    def _get_metrics(self, step: int) -> Any:
        try:
            metrics = super()._get_metrics(step)
            if metrics is None or all(isinstance(n, int | float) for n in metrics.values()):
                return metrics
        except (ValueError, AttributeError) as error:
            if faults.is_failure(error):
                raise
        logging.warning(
            "The metrics of the checkpoint %s are damaged: it does not count as the best.",
            self.directory / str(step),
        )
        return None


def open_manager(
    directory: epath.Path,
    *,
    keep: int,
    best: Callable[[Mapping[str, float]], float] | None,
    create: bool,
) -> Manager:
    """Opens the checkpoints of a directory.

    Args:
      directory: folder of the checkpoints, absolute.
      keep: number of most recent checkpoints to keep.
      best: score of a checkpoint by its metrics, whose highest is kept too; None: none is.
      create: whether to create the directory.
    """
    policies: list[preservation_policy.PreservationPolicy] = [preservation_policy.LatestN(keep)]
    if best is not None:
        policies.append(
            preservation_policy.BestN(
                get_metric_fn=best, n=1, keep_checkpoints_without_metrics=False
            )
        )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
        # The policy decides; but without this the metrics are not written, and a resumed run would
        # not know its best.
        best_fn=best,
        enable_async_checkpointing=True,
        # Else a save would wait for a bucket that cannot be reached. There is nothing to validate:
        # steps that exist are refused, and half-written ones replaced.
        file_options=ocp.options.FileOptions(skip_sync_file_validations=True),
        # Threads of the save would wait minutes for a directory that cannot be made. This one does
        # not, but for the answer of a bucket.
        async_options=ocp.options.AsyncOptions(
            create_directories_asynchronously=remote.is_remote(directory)
        ),
        create=create,
    )
    return Manager(directory, options=options)
