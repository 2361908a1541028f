"""Chooses config, batch and pairs to be seen for a budget of chip-days."""

import dataclasses
import functools
import json
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from clip_jax.common import clock, config_file
from clip_jax.configs import default
from clip_jax.errors import UserError
from clip_jax.models import flops
from clip_jax.models.sizes import Size, get_size
from clip_jax.plan import accuracy
from clip_jax.plan.chips import Chip
from clip_jax.plan.topology import Topology, parse_topology
from clip_jax.plan.units import Budget, count

PLANS = pathlib.Path(__file__).with_name("plans.json")  # benchmarks/plans.py writes it
# Configs that train from scratch at one of the published recipes, and the recipe.
CONFIGS = {
    "rn50": accuracy.CLIP,
    "rn101": accuracy.CLIP,
    "vit_b32": accuracy.CLIP,
    "vit_b16": accuracy.CLIP,
    "vit_l14": accuracy.CLIP,
    "vit_h14": accuracy.CLIP,
    "vit_g14": accuracy.CLIP,
    "siglip_b16": "sigmoid",
    "siglip_so400m": "sigmoid",
    "clipa:l14": "clipa",
    "clipa:h14": "clipa",
    "openmammut:b32": "captions",
    "openmammut:l14": "captions",
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run, or the whole of it.

    Attributes:
      prefix: beginning of the stage's settings: "config." or "config.stages.stage1.".
      warmup: duration of the config's.
      seen: pairs seen.
      settings: those that differ from the config, without the prefix.
    """

    prefix: str
    size: Size
    batch_size: int
    warmup: str
    seen: float
    settings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Option:
    """A run that the budget pays for.

    Attributes:
      config: name, as --config takes it.
      days: days of one chip.
      rate: source of the speed: "compiled", or the MFU that it was estimated at.
      settings: those on top of the config that its stored plan has.
      prediction: accuracy on ImageNet, zero-shot.
      batch_source: published result whose batch it has; "": the config's own.
      beyond: what lies outside the published results.
    """

    config: str
    stages: tuple[Stage, ...]
    days: float
    rate: str
    settings: tuple[str, ...]
    prediction: accuracy.Prediction
    batch_source: str
    beyond: tuple[str, ...]

    @property
    def seen(self) -> float:
        """The pairs that all stages see."""
        return sum(stage.seen for stage in self.stages)


@dataclasses.dataclass(frozen=True)
class Request:
    """A question: `collection` is the kind of data, `mfu` replaces those of plans and estimates."""

    budget: Budget
    pairs: float
    collection: str
    mfu: float | None = None


def options(request: Request, law: accuracy.Law) -> list[Option]:
    """Returns a run of each config that fits the budget, the best predicted first.

    A run sees at least as many pairs as the shortest published one of its recipe, and no more than
    the longest, whatever the budget.

    Raises:
      UserError: the budget is too small for all of them.
    """
    results = accuracy.published()
    found, needed = [], []
    for name, recipe in CONFIGS.items():
        stages, per_pair, rate, settings = _costs(name, request)
        alike = [r.setting.seen for r in results if r.setting.recipe == recipe]
        seen = min(request.budget.days * 86400 / per_pair, max(alike))
        needed.append((min(alike) * per_pair / 86400, min(alike), name))
        if seen < min(alike):
            continue
        batch, batch_source = _largest_batch(results, seen)
        factor = seen / sum(stage.seen for stage in stages)
        scaled = tuple(_scaled(stage, factor, batch) for stage in stages)
        smaller = any(new.batch_size < old.batch_size for new, old in zip(scaled, stages))
        setting = accuracy.Setting(stages[-1].size, seen, request.pairs, request.collection, recipe)
        option = Option(
            config=name,
            stages=scaled,
            days=seen * per_pair / 86400,
            rate=rate,
            settings=settings,
            prediction=law.predict(setting),
            batch_source=batch_source if smaller else "",
            beyond=_beyond(setting, results),
        )
        found.append(option)
    if not found:
        days, least, name = min(needed)
        chip = request.budget.chip.name
        raise UserError(
            f"--budget={request.budget.days:.3g} {chip}-days is too small: the shortest published "
            f"runs saw {count(least)} pairs, and {name}, the cheapest config, needs {days:.2g} "
            f"{chip}-days for them. configs/quickstart.py learns something within minutes."
        )
    return sorted(found, key=lambda option: -option.prediction.top1)


def whole_topology(budget: Budget) -> Topology:
    """Returns the largest slice, of a power of two of chips, that is busy for at least a day."""
    chip, chips = budget.chip, 1
    while chips * 2 <= min(budget.days, chip.largest, 256):
        chips *= 2
    shape = [1] * chip.dims
    for turn in range(chips.bit_length() - 1):
        shape[turn % chip.dims] *= 2
    shape = sorted(shape) if min(shape) > 1 or chip.dims == 2 else shape
    return parse_topology(f"{chip.name}:{'x'.join(map(str, shape))}")


def commands(option: Option, topology: Topology) -> tuple[str, str]:
    """Returns the command that trains, and the one that compiles it first to see if it fits."""
    own = [f"--{stage.prefix}{setting}" for stage in option.stages for setting in stage.settings]
    own += [f"--config.{setting}" for setting in option.settings]
    config = f"--config={option.config}"
    data = ["--config.data.source.type=tar", "--config.data.source.path=gs://BUCKET/shards/*.tar"]
    workdir = f"--workdir=gs://BUCKET/runs/{option.config.replace(':', '_')}"
    train = ["python", "main.py", config, *own, *data, workdir]
    place = [f"--topology={topology.name}"]
    if topology.slices > 1:
        train.append(f"--config.mesh.slices={topology.slices}")
        place.append(f"--slices={topology.slices}")
    if len(option.stages) > 1:
        place.append("--stage=stage1")
    return shlex.join(train), shlex.join(["python", "-m", "clip_jax", "plan", config, *place, *own])


def _costs(name: str, request: Request) -> tuple[tuple[Stage, ...], float, str, tuple[str, ...]]:
    """Returns the published stages, seconds of a chip for a pair, their source, and settings."""
    config = config_file.load(name)
    names = list(config.stages)
    parts = [default.of_stage(config, part) for part in names] or [config]
    prefixes = [f"config.stages.{part}." for part in names] or ["config."]
    stages = tuple(_stage(prefix, part) for prefix, part in zip(prefixes, parts))
    plan = stored_plan(name, request.budget.chip)
    if plan and request.mfu is None:
        return stages, 1 / plan["pairs_per_chip"], "compiled", plan["settings"]
    mfu = request.mfu or _cautious_mfu(stages[0].size.is_resnet)
    chip = request.budget.chip
    operations = 0.0
    for stage, part in zip(stages, parts):
        step = flops.step_flops(stage.size, stage.batch_size, part.data.captions)
        operations += step / stage.batch_size * stage.seen
    seconds = operations / (chip.flops * chip.devices * mfu) / sum(s.seen for s in stages)
    return stages, seconds, f"MFU {mfu:.2f}", plan["settings"] if plan else ()


def _stage(prefix: str, config: ConfigDict) -> Stage:
    size = get_size(config.model.name, config.model.size.to_dict())
    examples = clock.exact_steps(
        config.duration, batch_size=1, examples_per_epoch=400_000_000, total_steps=None
    )
    return Stage(prefix, size, config.batch_size, config.optim.warmup, examples, ())


def _scaled(stage: Stage, factor: float, batch: int) -> Stage:
    """Returns a stage that sees another number of pairs, with the settings that say so."""
    seen = stage.seen * factor
    batch = min(stage.batch_size, batch)
    settings = [f"duration={round(seen)} examples"]
    if batch < stage.batch_size:
        settings.append(f"batch_size={batch}")
    steps, per_epoch = seen / batch, 400_000_000
    warmup = clock.exact_steps(stage.warmup, batch_size=batch, examples_per_epoch=per_epoch)
    if warmup > steps / 10:
        settings.append(f"optim.warmup={max(1, round(steps / 10))} steps")
    return dataclasses.replace(stage, seen=seen, batch_size=batch, settings=tuple(settings))


def _largest_batch(results: Sequence[accuracy.Result], seen: float) -> tuple[int, str]:
    """Returns the largest batch with which a published run saw no more pairs, and its name.

    Of the batch, the power of two not above it, which divides over the chips.
    """
    known = [result for result in results if result.batch and result.setting.seen <= seen]
    largest = max(known, key=lambda result: result.batch or 0)
    assert largest.batch is not None
    name = f"{largest.model} on {largest.data}, {count(largest.setting.seen)} pairs seen"
    return 1 << (largest.batch.bit_length() - 1), name


@functools.cache
def _stored() -> dict[str, dict[str, Any]]:
    return json.loads(PLANS.read_text())


def stored_plan(config: str, chip: Chip) -> dict[str, Any] | None:
    """Returns pairs per second of a chip and the settings of a stored plan; None: there is none."""
    for key, plan in _stored().items():
        name, _, rest = key.partition(" on ")
        topology, *settings = rest.split()
        if name == config and topology.startswith(f"{chip.name}:") and _is_whole(settings):
            chips = parse_topology(topology).size / chip.devices
            return {
                "pairs_per_chip": plan["pairs_per_second"] / chips,
                "settings": tuple(settings),
            }
    return None


def _is_whole(settings: Sequence[str]) -> bool:
    """Tells a plan of a config from that of its first layers, by which changes are found."""
    return not any(setting.startswith(("model.", "batch_size")) for setting in settings)


def _cautious_mfu(resnet: bool) -> float:
    """Returns the smallest MFU of the stored plans of whole ViTs, or of ResNets."""
    return min(
        plan["mfu"]
        for key, plan in _stored().items()
        if key.startswith("rn") == resnet and _is_whole(key.split()[3:])
    )


def _beyond(setting: accuracy.Setting, results: Sequence[accuracy.Result]) -> tuple[str, ...]:
    """Returns what lies outside the range of the published results."""
    rows = [result.setting for result in results]
    finite = [row.pairs for row in rows if row.pairs < float("inf")]
    epochs = max(row.seen / min(row.pairs, row.seen) for row in rows)
    said = []
    if setting.pairs < min(finite):
        said.append(f"{count(setting.pairs)} pairs (published: at least {count(min(finite))})")
    if setting.pairs > max(finite) and setting.seen > max(finite):
        said.append(f"{count(setting.pairs)} pairs (published: at most {count(max(finite))})")
    if setting.seen / setting.pairs > epochs:
        said.append(
            f"{setting.seen / setting.pairs:,.0f} epochs (published: at most {epochs:,.0f})"
        )
    return tuple(said)
