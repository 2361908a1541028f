"""Stages of training, one after the other, each from the model of the one before."""

import dataclasses

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from clip_jax import models
from clip_jax.configs import default
from clip_jax.errors import UserError
from clip_jax.storage import locations
from clip_jax.training import notices, program, train, workdir


def train_all(config: ConfigDict, directory: epath.PathLike, command: str = "") -> None:
    """Trains all stages of a config, or goes on in the midst of them; without stages, the one run.

    Args:
      config: fields as in configs/default.py, validated.
      directory: the workdir; with stages, a folder of their workdirs.
      command: the user's command line, for the reports.

    Raises:
      UserError: a fault in config, data or workdir that the user can mend.
    """
    if not config.stages:
        train.train(config, directory, command)
        return
    directory = locations.reachable(directory)
    configs = {name: default.of_stage(config, name) for name in config.stages}
    _check(configs)
    before = config.init_from
    for number, (name, own) in enumerate(configs.items(), start=1):
        place = directory / name
        if own.branch_from in configs:
            own.branch_from = str(directory / own.branch_from)
        elif not own.branch_from:
            own.init_from = before
        before = str(place)
        if number < len(configs) and (place / train.REPORT).exists():
            workdir.check(place, own, lambda _: False)
            train.say(f"Stage {number} of {len(configs)} is finished, in {place}.")
            continue
        train.say(f"Stage {number} of {len(configs)}, in {place}.")
        train.train(own, place, command)


def _check(configs: dict[str, ConfigDict]) -> None:
    """Checks, before anything slow, that each stage can go on from the one before.

    Raises:
      UserError: a stage has no length, a model that differs in more than its resolution and the
        length of captions, or cannot go on from the whole state of another.
    """
    sizes = {}
    for name, own in configs.items():
        notices.check_durations(own)
        if own.duration.strip("0. ").isalpha():
            raise UserError(f"stages.{name}.duration is {own.duration!r}: it ends as it begins.")
        size = models.get_size(own.model.name, own.model.size.to_dict())
        free = ("image_size", "context_length")
        sizes[name] = {k: v for k, v in dataclasses.asdict(size).items() if k not in free}
        if own.branch_from in sizes:
            _check_branch(name, own, configs[own.branch_from])
        elif own.branch_from and len(sizes) > 1:
            earlier = ", ".join(other for other in sizes if other != name)
            raise UserError(
                f"stages.{name}.branch_from is {own.branch_from!r}: it takes the name of an "
                f"earlier stage, {earlier}."
            )
    first, *others = sizes
    for name in others:
        if wrong := [field for field, value in sizes[name].items() if value != sizes[first][field]]:
            raise UserError(
                f"stages.{name} has another model than stages.{first}, by {', '.join(wrong)}: only "
                "model.size.image_size and model.size.context_length may differ."
            )


def _check_branch(name: str, own: ConfigDict, before: ConfigDict) -> None:
    """Checks that a stage can go on from the whole state of an earlier one, its optimiser included.

    Raises:
      UserError: what would have been learned so far differs, or the stage ends as it begins.
    """
    changed = workdir.differences(workdir.to_plain(before), workdir.to_plain(own))
    may_differ = {*workdir.RATES, "batch_size"}
    wrong = [f"{field} ({a!r}, now {b!r})" for field, a, b in changed if field not in may_differ]
    start = f"stages.{name}.branch_from is {own.branch_from!r}"
    if wrong:
        raise UserError(
            f"{start}, whose optimiser it takes over, but other settings differ: "
            f"{', '.join(wrong)}. Without branch_from, a stage takes the model alone."
        )
    notices.check_branch(before, own)
    # Of any number of examples: the data are not open yet.
    (steps, old), (total, new) = (program.make_schedule(each, 10**9) for each in (before, own))
    if total <= steps:
        raise UserError(
            f"{start} and its duration {own.duration!r}: it counts from the start of that stage, "
            f"which ends after {steps:,} steps."
        )
    first = np.geomspace(1, steps, 1000).astype(int) - 1
    if not np.array_equal(old(first), new(first)):
        raise UserError(
            f"{start}, but by its schedule the learning rate of these {steps:,} steps would have "
            "been another: take optim.schedule=constant or rsqrt, which do not depend on the end, "
            "and a warm-up in steps."
        )
