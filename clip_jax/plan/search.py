"""Finds the fastest settings that fit a topology, by compiling the promising ones."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from clip_jax.common.formatting import format_seconds
from clip_jax.errors import UserError
from clip_jax.plan import make
from clip_jax.plan.chips import GIB, IMAGES_PER_CORE
from clip_jax.plan.estimate import Choice, Correction, Task, remats
from clip_jax.plan.progress import Report, stage
from clip_jax.plan.topology import Topology
from clip_jax.training.program import split_by_tensor

# Choices up to this factor above the available memory are tried, since estimates err.
_MEMORY_MARGIN = 1.15
# Choices estimated slower than the best by more than this factor are not tried.
_TIME_MARGIN = 1.25


@dataclasses.dataclass
class Tried:
    """A choice and its plan by the compiler."""

    choice: Choice
    plan: make.Plan

    @property
    def seconds(self) -> float:
        """The seconds of a step; infinity: it does not fit."""
        return self.plan.step.seconds if self.plan.fits and self.plan.step else math.inf


@dataclasses.dataclass
class SearchResult:
    """The outcome of a search.

    Attributes:
      tried: compiled choices, the fastest first, those that do not fit last.
      candidates: number of choices that the mesh and the batch allow.
      left: number of those that might still fit and be faster.
    """

    tried: list[Tried]
    candidates: int
    left: int

    @property
    def best(self) -> Tried | None:
        """The fastest choice that fits; None: none fits."""
        return self.tried[0] if self.tried and self.tried[0].plan.fits else None

    def to_json(self) -> dict[str, Any]:
        """Returns all plans as JSON fields."""
        return {
            "candidates": self.candidates,
            "left": self.left,
            "tried": [
                {
                    "choice": dataclasses.asdict(tried.choice),
                    "flags": tried.choice.flags,
                    "plan": tried.plan.to_json(),
                }
                for tried in self.tried
            ],
        }


def search(
    config: ConfigDict,
    topology: Topology,
    *,
    minutes: float = 30.0,
    examples: float = 400e6,
    top: int = 10,
    images_per_core: float = IMAGES_PER_CORE,
    most: int = 24,
    report: Report = print,
) -> SearchResult:
    """Tries meshes, micro-batches, rematerialisation and loss methods, the promising ones first.

    The fastest is then tried with another rematerialisation of the text tower, and with its layers
    unrolled, or in a scan where the config unrolls them.

    Args:
      config: all other settings.
      topology: topology to compile for.
      minutes: budget; no compilation starts that would likely end later.
      examples, top, images_per_core: arguments of `make.make_plan`.
      most: most compilations, whatever the budget.
      report: called with lines of progress.

    Raises:
      UserError: nothing can be tried.
    """
    began = time.monotonic()
    task = make_task(config, topology, examples)
    choices = list(candidates(task))
    if not choices:
        raise UserError(
            f"A batch of {config.batch_size} cannot be split over the {topology.size} devices of "
            f"{topology} in any way: take a multiple of {topology.size}."
        )
    correction, tried, longest = Correction(), [], 0.0

    def attempt(choice: Choice, left: Callable[[], int]) -> None:
        nonlocal longest
        with stage(f"Compiling {choice}", report):
            plan = make.make_plan(
                choice.apply(config),
                topology,
                examples=examples,
                top=top,
                images_per_core=images_per_core,
            )
        longest = max(longest, plan.compile_seconds)
        step = plan.step.seconds if plan.step else None
        correction.learn(choice, task, plan.memory.temporaries, step)
        tried.append(Tried(choice, plan))
        report(_progress(tried[-1], len(tried), left(), time.monotonic() - began, minutes * 60))

    def late() -> bool:
        return bool(tried) and time.monotonic() - began + longest > minutes * 60

    def left() -> int:
        return min(len(_promising(choices, tried, task, correction)), most - len(tried))

    while (open_ := _promising(choices, tried, task, correction)) and len(tried) < most:
        if late():
            break
        attempt(open_[0], left)
    tried.sort(key=lambda t: (t.seconds, t.plan.missing))
    for change in _variants(task):
        if tried[0].plan.fits and not late():
            varied = dataclasses.replace(tried[0].choice, **change)
            if varied not in {t.choice for t in tried}:
                attempt(varied, lambda: 0)
                tried.sort(key=lambda t: (t.seconds, t.plan.missing))
    return SearchResult(tried, len(choices), len(open_))


def _variants(task: Task) -> Iterator[dict[str, Any]]:
    """Yields changes to try on the fastest choice, one after the other."""
    if task.size.has_text_blocks:
        yield {"text_remat": "none"}
        yield {"text_remat": "full"}
    yield {"scan": not task.scan}


def make_task(config: ConfigDict, topology: Topology, examples: float) -> Task:
    """Builds the common properties of all choices."""
    plain = Choice().apply(config)
    plain.batch_size = topology.size  # any that divides: the parameters do not depend on it
    built = make.build(plain, topology, examples)
    state = built.state
    count = float(sum(math.prod(leaf.shape) for leaf in _leaves(state.params)))
    return Task(
        size=built.net.size,
        batch_size=config.batch_size,
        captions=config.data.captions,
        parameters=count,
        state_bytes=make.shard_bytes((state.params, state.opt_state, state.ema)) / count,
        topology=topology,
        scan=config.model.scan_layers,
    )


def _leaves(tree: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(tree)


def candidates(task: Task) -> Iterator[Choice]:
    """Yields all choices that the chips, the heads and the batch allow."""
    size, chips = task.size, task.topology.size
    inside = chips // task.topology.slices
    split = split_by_tensor(size).values()
    tensors = [n for n in (1, 2, 4, 8) if inside % n == 0 and not any(v % n for v in split)]
    for tensor in tensors:
        for fsdp in _powers(inside // tensor):
            for steps in _powers(max(task.batch_size // (chips // tensor), 1)):
                unit = math.lcm(chips, chips // tensor * steps)
                if task.batch_size % unit:
                    continue
                for remat in remats():
                    for method in ("all_gather", "ring"):
                        yield Choice(fsdp, tensor, steps, remat, method, task.scan)


def _powers(limit: int) -> list[int]:
    """Returns the powers of two that divide a number."""
    return [2**i for i in range(limit.bit_length()) if limit % 2**i == 0]


def _promising(
    choices: list[Choice], tried: list[Tried], task: Task, correction: Correction
) -> list[Choice]:
    """Returns the untried choices that may fit and be the fastest, the most promising first."""
    available = task.topology.chip.hbm
    best = min((t.seconds for t in tried), default=math.inf)
    known = {t.choice for t in tried}
    kept = []
    for choice in choices:
        if choice in known:
            continue
        need, seconds = correction.need(choice, task), correction.time(choice, task)
        if choice.remat in correction.memory:  # a corrected estimate errs less
            fits = need <= available * (_MEMORY_MARGIN + 1) / 2
        else:
            fits = need <= available * _MEMORY_MARGIN
        if fits and seconds <= best * _TIME_MARGIN:
            # A choice that nearly fills the memory ranks behind equally fast ones: it may not fit.
            kept.append((seconds * (1 + 0.2 * max(need / available - 0.9, 0)), str(choice), choice))
    return [choice for *_, choice in sorted(kept, key=lambda row: row[:2])]


def _progress(tried: Tried, done: int, left: int, spent: float, budget: float) -> str:
    plan = tried.plan
    if plan.fits and plan.step and plan.memory.peak:
        outcome = f"{plan.step.seconds * 1e3:,.1f} ms, {plan.memory.peak / GIB:.2f} GiB"
    else:
        outcome = f"does not fit, {plan.missing / GIB:.2f} GiB too much"
    rest = min(spent / done * left, max(budget - spent, 0))
    return (
        f"[{done}, at most {left} to go, {format_seconds(spent)} spent, "
        f"ETA {format_seconds(rest)}] {tried.choice}: {outcome}"
    )


def format_search(found: SearchResult, command: str) -> str:
    """Formats the ranked choices, and the command with the best."""
    lines = ["       ms    MFU    GiB  settings"]
    for tried in found.tried:
        plan = tried.plan
        if plan.fits and plan.step and plan.memory.peak:
            peak = plan.memory.peak / GIB
            row = f"{plan.step.seconds * 1e3:9,.1f}  {plan.step.mfu:5.3f}  {peak:5.2f}"
        else:
            row = f"{'does not fit':>16}  +{plan.missing / GIB:.2f}"
        lines.append(f"{row}  {tried.choice}")
    count = f"{len(found.tried)} combinations compiled, of {found.candidates:,} and their variants"
    left = (
        f"; {found.left:,} might still be faster: a larger --search_minutes" if found.left else ""
    )
    lines.append(f"{count}{left}.")
    if found.best:
        # The flags follow the user's: of a flag given twice, the last counts.
        lines.append(f"Fastest:\n  {command} {found.best.choice.flags}")
    else:
        lines.append("None of them fits: take more chips, or a smaller batch.")
    return "\n".join(lines)
