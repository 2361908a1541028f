"""The paper's protocols, one file each."""

from collections.abc import Mapping

from clip_jax.evaluate.tasks import (
    bias,
    few_shot,
    linear_probe,
    overlap,
    retrieval,
    robustness,
    zeroshot,
)
from clip_jax.evaluate.tasks.context import Context, Task

__all__ = ["TASKS", "Context", "Task"]

TASKS: Mapping[str, Task] = {
    "zeroshot": zeroshot.TASK,
    "retrieval": retrieval.TASK,
    "linear_probe": linear_probe.TASK,
    "few_shot": few_shot.TASK,
    "robustness": robustness.TASK,
    "overlap": overlap.TASK,
    "bias": bias.TASK,
}
