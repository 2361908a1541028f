"""The stored curves of the reference runs, whose configs are the lines of configs/reference.py."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from clip_jax.configs import default
from clip_jax.training import workdir

FILE = Path(__file__).with_suffix(".json")


@dataclasses.dataclass(frozen=True)
class Reference:
    """Curves of one config over several runs, with the same steps.

    Attributes:
      name: line of configs/reference.py.
      settings: settings that are not the defaults, by dotted name, as config.json has them.
      measured: hardware and packages of the runs.
      steps: steps of each metric, ascending.
      runs: values of each metric at these steps, by the name of the run.
    """

    name: str
    settings: Mapping[str, Any]
    measured: str
    steps: Mapping[str, Sequence[int]]
    runs: Mapping[str, Mapping[str, Sequence[float]]]


def load_all(path: Path = FILE) -> dict[str, Reference]:
    """Reads a file of references, by name; without the file there are none."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return {name: Reference(name, **fields) for name, fields in found.items()}


def save_all(path: Path, references: Mapping[str, Reference]) -> None:
    """Writes a file of references, each curve in a line."""
    fields = {name: dataclasses.asdict(one) for name, one in references.items()}
    for one in fields.values():
        del one["name"]
    path.write_text(_lines(fields) + "\n")


def _lines(value: Any, depth: int = 0) -> str:
    """Formats JSON with a line for each number, text or list."""
    if not isinstance(value, dict):
        return json.dumps(value)
    space = " " * (depth + 1)
    inner = [f"{space}{json.dumps(name)}: {_lines(one, depth + 1)}" for name, one in value.items()]
    return "{\n" + ",\n".join(inner) + "\n" + " " * depth + "}" if inner else "{}"


def changed_settings(config: ConfigDict) -> dict[str, Any]:
    """Returns the settings that are not the defaults, by dotted name, the seed aside."""
    defaults = workdir.flatten(workdir.to_plain(default.get_config()))
    settings = workdir.flatten(workdir.to_plain(config))
    return {
        name: value
        for name, value in settings.items()
        if name != "seed" and (name not in defaults or defaults[name] != value)
    }
