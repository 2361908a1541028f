"""Stages of training, one after the other, each from the model of the one before."""

import dataclasses

from etils import epath
from ml_collections import ConfigDict

from clip_jax import models
from clip_jax.configs import default
from clip_jax.errors import UserError
from clip_jax.storage import locations
from clip_jax.training import notices, train, workdir


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
        own.init_from, before = before, str(place)
        if number < len(configs) and (place / train.REPORT).exists():
            workdir.check(place, own, lambda _: False)
            train.say(f"Stage {number} of {len(configs)} is finished, in {place}.")
            continue
        train.say(f"Stage {number} of {len(configs)}, in {place}.")
        train.train(own, place, command)


def _check(configs: dict[str, ConfigDict]) -> None:
    """Checks, before anything slow, that each stage can go on from the one before.

    Raises:
      UserError: a stage has no length, or a model that differs in more than its resolution and the
        length of captions.
    """
    sizes = {}
    for name, own in configs.items():
        notices.check_durations(own)
        if own.duration.strip("0. ").isalpha():
            raise UserError(f"stages.{name}.duration is {own.duration!r}: it ends as it begins.")
        size = models.get_size(own.model.name, own.model.size.to_dict())
        free = ("image_size", "context_length")
        sizes[name] = {k: v for k, v in dataclasses.asdict(size).items() if k not in free}
    first, *others = sizes
    for name in others:
        if wrong := [field for field, value in sizes[name].items() if value != sizes[first][field]]:
            raise UserError(
                f"stages.{name} has another model than stages.{first}, by {', '.join(wrong)}: only "
                "model.size.image_size and model.size.context_length may differ."
            )
