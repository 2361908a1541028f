"""The grid of a sweep: one run for every combination of values."""

import dataclasses
import itertools
import re
from collections.abc import Sequence

from ml_collections import ConfigDict

from clip_jax.common import config_file
from clip_jax.errors import UserError
from clip_jax.training import validation

COMMAND = "python -m clip_jax sweep"
_EXAMPLE = '--grid="model.size.image_width=48,96,192"'
_COMMA = re.compile(r",(?![^(\[]*[)\]])")  # outside of brackets: (2,) is one value
_UNFIT = re.compile(r"[^A-Za-z0-9.+-]+")  # for the name of a folder


@dataclasses.dataclass(frozen=True)
class Axis:
    """Settings of the grid that change together.

    Attributes:
      names: dotted names of the settings.
      values: a value of each, as text, for every place on the axis.
    """

    names: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class GridRun:
    """One run of the grid.

    Attributes:
      name: folder of the run in the workdir of the sweep.
      values: its value of the first setting of every axis, by the setting's name.
      config: its settings, resolved.
      words: arguments of "python -m clip_jax train" that train it, the workdir aside.
    """

    name: str
    values: dict[str, str]
    config: ConfigDict
    words: list[str]


def make_runs(words: Sequence[str], grid: Sequence[str]) -> list[GridRun]:
    """Makes the runs of a grid, in the order of the command line, the last axis the fastest.

    Args:
      words: arguments that every run has: --config=NAME and --config.SETTING=VALUE.
      grid: axes as they were typed, "SETTING=VALUE,VALUE", several settings joined by ";".

    Raises:
      UserError: an axis or a run is wrong, or two runs are the same.
    """
    from clip_jax.training import workdir  # late, with JAX: --help answers at once

    axes = [_axis(text) for text in grid]
    if not axes:
        raise UserError(f"--grid is missing, as in {COMMAND} --config=quickstart {_EXAMPLE}.")
    names = [name for axis in axes for name in axis.names]
    given = [word.lstrip("-").partition("=")[0].removeprefix("config.") for word in words]
    if twice := [name for name in names if names.count(name) > 1 or name in given]:
        raise UserError(f"The setting {twice[0]} is given twice: name it in one --grid only.")
    labels = _labels([axis.names[0] for axis in axes])
    runs = [
        _run(words, axes, labels, values)
        for values in itertools.product(*(axis.values for axis in axes))
    ]
    seen: dict[str, str] = {}
    for run in runs:
        if other := seen.get(key := workdir.to_json(run.config)):
            raise UserError(f"The grid has one run twice: {other} and {run.name}.")
        seen[key] = run.name
    if len({run.name for run in runs}) < len(runs):
        raise UserError("Two values of the grid differ only in characters that no folder may have.")
    return runs


def _axis(text: str) -> Axis:
    names, columns = [], []
    for part in text.split(";"):
        name, equals, values = part.strip().partition("=")
        name = name.lstrip("-").removeprefix("config.").strip()
        split = [value.strip() for value in _COMMA.split(values)]
        if not (name and equals and all(split)):
            raise UserError(
                f"--grid={text!r} is no axis of a grid: write a setting and its values, as in "
                f"{_EXAMPLE}. Settings that change together are joined by a semicolon, as in "
                '--grid="model.size.image_width=48,96; model.size.text_width=32,64".'
            )
        if len(split) == 1:
            raise UserError(
                f"The grid has one value of {name}: give several, or --config.{name}={split[0]} "
                "for all runs."
            )
        names.append(name)
        columns.append(split)
    if len({len(column) for column in columns}) > 1:
        found = ", ".join(f"{len(column)} of {name}" for name, column in zip(names, columns))
        raise UserError(f"Settings of one --grid change together, but there are {found}.")
    if twice := [value for value in columns[0] if columns[0].count(value) > 1]:
        raise UserError(f"The grid has the value {twice[0]} of {names[0]} twice.")
    return Axis(tuple(names), tuple(zip(*columns)))


def _labels(names: Sequence[str]) -> list[str]:
    """Returns the last part of each dotted name, or all of it where two have the same."""
    last = [name.rpartition(".")[2] for name in names]
    return [short if last.count(short) == 1 else name for short, name in zip(last, names)]


def _run(
    words: Sequence[str],
    axes: Sequence[Axis],
    labels: Sequence[str],
    values: Sequence[tuple[str, ...]],
) -> GridRun:
    name = "_".join(
        f"{label}-{_UNFIT.sub('-', mine[0]).strip('-')}" for label, mine in zip(labels, values)
    )
    pairs = [pair for axis, mine in zip(axes, values) for pair in zip(axis.names, mine)]
    own = [*words, *(f"--config.{setting}={value}" for setting, value in pairs)]
    config = config_file.parse(own, COMMAND, lambda _: None).config
    try:
        _check(config)
    except UserError as error:
        raise UserError(f"The run {name} of the grid cannot be: {error}") from None
    firsts = {axis.names[0]: mine[0] for axis, mine in zip(axes, values)}
    return GridRun(name, firsts, config, own)


def _check(config: ConfigDict) -> None:
    """Checks what needs no data; raises UserError."""
    from clip_jax import models  # with JAX
    from clip_jax.training import notices

    if config.stages:
        raise UserError("It has stages, whose compute is not that of one run.")
    validation.validate(config)
    notices.check_durations(config)
    models.get_size(config.model.name, config.model.size.to_dict())
