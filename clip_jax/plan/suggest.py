"""Suggests settings with which a program fits that does not."""

import dataclasses
import math
from collections.abc import Iterator

from ml_collections import ConfigDict

from clip_jax.plan import search
from clip_jax.plan.chips import GIB
from clip_jax.plan.estimate import Choice, Correction, Task
from clip_jax.plan.make import Plan
from clip_jax.plan.topology import Topology

_COUNT = 5


def suggestions(config: ConfigDict, topology: Topology, plan: Plan) -> list[str]:
    """Returns settings that are estimated to fit, the fastest first, as lines to print.

    The compiler's figures for the settings that do not fit correct the estimate.
    """
    task = search.make_task(config, topology, plan.examples)
    current, correction = Choice.of(config), Correction()
    correction.learn(current, task, plan.memory.temporaries)
    available = topology.chip.hbm * 0.95  # estimates err
    fitting = [c for c in search.candidates(task) if correction.need(c, task) <= available]
    fitting.sort(key=lambda c: correction.time(c, task))
    lines = [
        f"{_changes(current, choice)}  (about {correction.need(choice, task) / GIB:.1f} GiB)"
        for choice in _varied(fitting, current)
    ][:_COUNT]
    lines += _chips(task, current, correction, available)
    if lines:
        lines.append("These are estimates; --search compiles such settings and finds the fastest.")
    return lines


def _varied(fitting: list[Choice], current: Choice) -> Iterator[Choice]:
    """Yields choices that change one setting first, then those that change two."""
    single = [c for c in fitting if _differences(current, c) == 1]
    seen = set()
    for choice in single:
        changed = next(f for f in _FLAGS if getattr(choice, f) != getattr(current, f))
        if changed not in seen:
            seen.add(changed)
            yield choice
    for choice in fitting:
        if _differences(current, choice) == 2 and choice not in single:
            yield choice


_FLAGS = {
    "accum_steps": "--config.accum_steps",
    "remat": "--config.model.remat",
    "method": "--config.loss.method",
    "fsdp": "--config.mesh.fsdp",
    "tensor": "--config.mesh.tensor",
}


def _differences(a: Choice, b: Choice) -> int:
    return sum(getattr(a, name) != getattr(b, name) for name in _FLAGS)


def _changes(current: Choice, choice: Choice) -> str:
    return " ".join(
        f"{flag}={getattr(choice, name)}"
        for name, flag in _FLAGS.items()
        if getattr(choice, name) != getattr(current, name)
    )


def _chips(task: Task, current: Choice, correction: Correction, available: float) -> list[str]:
    """Finds the smallest larger slice on which the settings fit unchanged."""
    shape = list(task.topology.shape)
    for _ in range(8):
        smallest = min(range(len(shape)), key=lambda i: shape[i])
        shape[smallest] *= 2
        larger = dataclasses.replace(task.topology, shape=tuple(shape))
        grown = dataclasses.replace(task, topology=larger)
        if math.prod(shape) > larger.chip.largest or task.batch_size % larger.size:
            break
        if correction.need(current, grown) <= available:
            need = correction.need(current, grown) / GIB
            return [f"as it is, on {larger}  (about {need:.1f} GiB)"]
    return []
