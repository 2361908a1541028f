"""The config of a command line: --config=NAME:ARGUMENT, and --config.SETTING=VALUE on top of it."""

import dataclasses
import difflib
import importlib.util
import os
import pathlib
import re
import textwrap
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

import clip_jax.configs
from clip_jax.configs import default
from clip_jax.errors import UserError

FOLDER = pathlib.Path(clip_jax.configs.__path__[0])  # the configs that come with clip_jax

_ABOUT = "A config of those below, such as vit_b32 or vit_b32:smoke, or the path of your own file."


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """The parsed arguments of a command.

    Attributes:
      name: the config as it was typed, such as "vit_b32:smoke".
      config: the config, with the settings of the command line.
      flags: values of the command's other flags, by name.
    """

    name: str
    config: ConfigDict
    flags: dict[str, Any]


def parse(
    arguments: Sequence[str], command: str, define: Callable[[flags.FlagValues], None]
) -> CommandLine:
    """Reads the config and applies the settings.

    Args:
      arguments: those after the command.
      command: command line up to the arguments, for messages: "python main.py".
      define: defines the command's other flags.

    Raises:
      UserError: an argument is wrong; the message suggests the nearest name.
    """
    name, rest = _split(arguments)
    if not name:
        raise UserError(
            f"The flag --config is missing, as in {command} --config=vit_b32:smoke, a small run on "
            "embedded data. It takes the path of a config file, or a config that comes with "
            f"clip_jax: {', '.join(shipped())}."
        )
    values = flags.FlagValues()
    define(values)
    own = list(values)
    config = load(name)
    argv = [command, *rest]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        stray = values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        meant = [f"--{flag}" for flag in difflib.get_close_matches(error.flagname, own, 1)]
        meant = meant or _settings_like(error.flagname, _names(config))
        raise UserError(
            f"There is no flag --{error.flagname}.{_did_you_mean(meant)} See {command} --help."
        ) from None
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            _unknown_setting(rest, _names(load(name)))
            or f"The command line cannot be used: {_reason(error)}. See {command} --help."
        ) from None
    if stray:
        raise UserError(
            f"Unknown argument {stray[0]!r}: settings are given as --config.NAME=VALUE."
        )
    get: dict[str, Any] = values.flag_values_dict()
    return CommandLine(name, get["config"], {flag: get[flag] for flag in own})


def help_text(about: str, define: Callable[[flags.FlagValues], None]) -> str:
    """Returns the text of --help: `about`, the flags, the configs."""
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, _ABOUT, flag_values=values)
    define(values)
    lines = [about.strip(), "", "Flags:"]
    for name in values:
        flag = values[name]
        default = "" if flag.default in (None, False) else f" Default: {flag.default}."
        lines += [f"  --{name}", textwrap.indent(_wrap(f"{flag.help}{default}"), " " * 6)]
    settings = f"Every setting, with its unit: {_shown(FOLDER / 'default.py')}"
    return "\n".join([*lines, "", _wrap(f"Configs: {', '.join(shipped())}."), settings])


def shipped() -> list[str]:
    """Returns the names of the configs that come with clip_jax."""
    return sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in ("__init__", "default"))


def find(name: str) -> tuple[pathlib.Path, str]:
    """Returns the file of a config, and the argument after the colon.

    Raises:
      UserError: there is no such file.
    """
    path, _, argument = name.partition(":")
    file = pathlib.Path(path).expanduser()
    if file.suffix == ".py" and file.is_file():
        return file, argument
    # Commands with configs/NAME.py, as the documentation has them, work from any folder.
    if str(file.parent) in (".", "configs") and file.suffix in ("", ".py"):
        file = FOLDER / f"{file.stem}.py"
        if file.stem in shipped():
            return file, argument
    meant = [f"--config={each}" for each in difflib.get_close_matches(file.stem, shipped(), 1)]
    what = "file" if path.endswith(".py") else "config"
    raise UserError(
        f"There is no {what} {path}.{_did_you_mean(meant)} Give the path of a file that ends in "
        f".py, or one of the configs that come with clip_jax: {', '.join(shipped())}."
    )


def load(name: str) -> ConfigDict:
    """Runs the file of a config.

    Raises:
      UserError: there is no such file, or something in it fails.
    """
    path, argument = find(name)
    spec = importlib.util.spec_from_file_location("config_file", path)
    assert spec is not None, path
    assert spec.loader is not None, path  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        # A config of one's own need not take an argument.
        return module.get_config(argument) if ":" in name else module.get_config()
    except UserError:
        raise
    except Exception as error:
        raise UserError(_failed(path, error)) from error


def _split(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the value of --config, "" without one, and the arguments besides it."""
    name, rest, remaining = "", [], iter(arguments)
    for argument in remaining:
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config"):
            name = value if equals else next(remaining, "")
        else:
            rest.append(argument)
    return name, rest


def _failed(path: pathlib.Path, error: Exception) -> str:
    """Returns a paragraph on an error in the file of a config."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if pathlib.Path(frame.filename) == path]
    place = f"The config {path}" + (f", line {lines[-1]}" if lines else "")
    if isinstance(error, ModuleNotFoundError) and error.name == "configs":
        return (
            f"{place}, imports configs, which is a folder of the repository and not to be found "
            "from here. Write `from clip_jax.configs import default`, which works anywhere."
        )
    # "Key "name" does not exist", of ml_collections.
    field = re.match(r"\W*(?:Key )?[\"'](\w+)[\"']", str(error))
    if field and isinstance(error, AttributeError | KeyError):
        renamed = {old: new for old, new in default.RENAMED.items() if field[1] in old.split(".")}
        if renamed:
            return f"{place}: {'; '.join(map(_now_called, renamed.items()))}."
    return f"{place}, cannot be used: {type(error).__name__}: {_reason(error)}."


def _unknown_setting(arguments: Sequence[str], known: Sequence[str]) -> str:
    """Returns a paragraph on the first unknown setting; "" if all are known."""
    for argument in arguments:
        flag = argument.partition("=")[0].lstrip("-")
        if not flag.startswith("config."):
            continue
        name = flag.removeprefix("config.")
        if name in default.RENAMED:
            return f"{_now_called((name, default.RENAMED[name]))}."
        within = [old for old in default.RENAMED if old.startswith(f"{name}.")]
        if within and not any(f"{each}.".startswith(f"{name}.") for each in known):
            return f"{_now_called((within[0], default.RENAMED[within[0]]))}."
        if not any(f"{each}.".startswith(f"{name}.") for each in known):
            return (
                f"There is no setting {name}.{_did_you_mean(_settings_like(name, known))} "
                f"Every setting stands in {_shown(FOLDER / 'default.py')}."
            )
    return ""


def _names(config: ConfigDict, prefix: str = "") -> list[str]:
    """Returns the dotted names of all settings."""
    found = []
    for name in config:
        value = config.get(name)
        inner = _names(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else []
        found += inner or [prefix + name]
    return found


def _settings_like(name: str, known: Sequence[str]) -> list[str]:
    """Returns flags of the settings that a wrong name may mean, the most likely ones."""
    leaf = name.rpartition(".")[2]
    leaves = {each.rpartition(".")[2] for each in known}
    meant = [each for each in known if each.rpartition(".")[2] == leaf]
    meant = meant or difflib.get_close_matches(name, known, 1, cutoff=0.8)
    # A name that was cut short: batch for batch_size.
    meant = meant or [
        each for each in known if f"_{each.rpartition('.')[2]}_".find(f"_{leaf}_") >= 0
    ]
    if not meant and (close := difflib.get_close_matches(leaf, leaves, 1)):
        meant = [each for each in known if each.rpartition(".")[2] == close[0]]
    # If several end in that part, those that fit the rest of the name best.
    meant.sort(key=lambda each: -difflib.SequenceMatcher(None, name, each).ratio())
    return [f"--config.{each}" for each in meant[:3]]


def _did_you_mean(names: Iterable[str]) -> str:
    return f" Did you mean {' or '.join(names)}?" if names else ""


def _now_called(names: tuple[str, str]) -> str:
    return f"The setting {names[0]} is now called {names[1]}"


def _reason(error: Exception) -> str:
    """Returns the message of an error, on one line, without a full stop."""
    text = str(error.args[-1]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()).rstrip(".")


def _shown(path: pathlib.Path) -> str:
    """Returns a path as short as it can be typed from here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _wrap(text: str) -> str:
    return textwrap.fill(text, 94, break_long_words=False, break_on_hyphens=False)
