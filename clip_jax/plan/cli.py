"""python -m clip_jax plan --config=vit_b32 --topology=v5e:16x16

Compiles the training step of a config with the real TPU compiler, for a pod that need not exist
here, and prints what it needs of each chip: memory, operations, collectives, and the time a step is
predicted to take. Needs no TPU, but libtpu: pip install "jax[tpu]".

    python -m clip_jax plan --config=vit_l14 --topology=v5p:4x4x8 --slices=2
    python -m clip_jax plan --config=vit_b32 --topology=v5e:4x4 --search
    python -m clip_jax plan --budget="256 v5e-days" --pairs=400M

The last chooses the config for a budget; python -m clip_jax plan --budget --help has its flags.

Any setting can be given, as in --config.batch_size=4096. The data are not looked at. Exit status: 0
if it fits, 1 if it does not, 2 for a user error.
"""

import copy
import dataclasses
import json
import os
import pathlib
import shlex
import sys
import warnings
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from clip_jax.common import commands, config_file
from clip_jax.configs import default
from clip_jax.errors import UserError
from clip_jax.plan import budget_cli
from clip_jax.plan import topology as topologies
from clip_jax.plan.chips import IMAGES_PER_CORE
from clip_jax.storage import locations, writing
from clip_jax.training import validation

PAPER_EXAMPLES = 400e6
_COMMAND = "python -m clip_jax plan"


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of the command; the flags' help texts describe them.

    Attributes:
      settings: arguments of main.py that train with the same settings on these slices.
    """

    config: ConfigDict
    settings: list[str]
    topology: topologies.Topology
    examples: float
    top: int
    images_per_core: float
    json: str | None
    hlo: str | None
    search: bool
    search_minutes: float


def main(arguments: list[str]) -> None:
    """Runs the command; ends the process where it must."""
    if budget_cli.is_meant(arguments):
        budget_cli.main(arguments)
        return
    if {"-h", "--help", "--helpfull"} & set(arguments):
        print(config_file.help_text(__doc__ or "", _define))
        return
    topologies.prepare_environment()
    _silence()
    with commands.plain_errors():
        request = _request(config_file.parse(arguments, _COMMAND, _define), arguments)
        fits = _search(request) if request.search else _plan(request)
    sys.exit(0 if fits else 1)


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "topology", None, "Generation and chips: v5e:16x16, v5p:8x16x16.", flag_values=values
    )
    flags.DEFINE_integer(
        "slices", None, "TPU slices; otherwise the config's mesh.slices.", flag_values=values
    )
    flags.DEFINE_string(
        "stage", None, "Stage to plan, of a config that has several.", flag_values=values
    )
    flags.DEFINE_float(
        "examples",
        PAPER_EXAMPLES,
        "Examples per epoch, for the predicted days of training.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "top", 10, "How many of the longest instructions to list.", flag_values=values
    )
    flags.DEFINE_float(
        "images_per_core",
        IMAGES_PER_CORE,
        "Images that a core of a host loads per second, to tell whether the input keeps up; "
        "benchmarks/input.py measures it.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "json", None, "File for all figures, or - to print them instead.", flag_values=values
    )
    flags.DEFINE_string(
        "hlo", None, "File for the text of the compiled program.", flag_values=values
    )
    flags.DEFINE_bool(
        "search",
        False,
        "Find the fastest mesh, micro-batch, rematerialisation and loss method that fit.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "search_minutes", 30.0, "Minutes that a search may take.", flag_values=values
    )


def _request(given: config_file.CommandLine, arguments: list[str]) -> Request:
    get = given.flags
    if get["topology"] is None:
        raise UserError(
            f"--topology is missing, as in {_COMMAND} --config=vit_b32 --topology=v5e:16x16."
        )
    config = _stage(copy.deepcopy(given.config), get["stage"]).unlock()
    slices = config.mesh.slices if get["slices"] is None else get["slices"]
    if config.mesh.slices == 1:
        config.mesh.slices = slices
    _validate(config)
    _check(get)
    return Request(
        config=config,
        settings=_settings(arguments, config),
        topology=topologies.parse_topology(get["topology"], slices),
        examples=get["examples"],
        top=get["top"],
        images_per_core=get["images_per_core"],
        json=get["json"],
        hlo=get["hlo"],
        search=get["search"],
        search_minutes=get["search_minutes"],
    )


def _stage(config: ConfigDict, name: str | None) -> ConfigDict:
    """Returns the config of the stage that is asked for; without stages, the config."""
    stages = list(config.stages)
    if name in (None, "") and not stages:
        return config
    if name not in stages:
        has = f"the stages {', '.join(stages)}" if stages else "no stages"
        raise UserError(f"--stage is {name or 'missing'}, and the config has {has}.")
    return default.of_stage(config, name)


def _settings(arguments: list[str], config: ConfigDict) -> list[str]:
    kept = [argument for argument in arguments if argument.startswith(("--config=", "--config."))]
    slices = f"--config.mesh.slices={config.mesh.slices}"
    if config.mesh.slices > 1 and slices not in kept:
        kept.append(slices)
    return kept


def _plan(request: Request) -> bool:
    # Imported late: a user error on the command line is answered at once.
    from clip_jax.plan import make, suggest, table

    config, topology = request.config, request.topology
    plan = make.make_plan(
        config,
        topology,
        examples=request.examples,
        top=request.top,
        images_per_core=request.images_per_core,
        report=_report,
        hlo_file=request.hlo,
    )
    suggestions = [] if plan.fits else suggest.suggestions(config, topology, plan)
    if _write_json(request.json, plan.to_json() | {"suggestions": suggestions}):
        print(table.format_plan(plan, suggestions))
    return plan.fits


def _search(request: Request) -> bool:
    from clip_jax.plan import search, table

    found = search.search(
        request.config,
        request.topology,
        minutes=request.search_minutes,
        examples=request.examples,
        top=request.top,
        images_per_core=request.images_per_core,
        report=_report,
    )
    if _write_json(request.json, found.to_json()):
        print(search.format_search(found, shlex.join(["python", "main.py", *request.settings])))
        if found.best:
            print("\n" + table.format_plan(found.best.plan))
    return found.best is not None


def _check(get: dict[str, Any]) -> None:
    """Checks the arguments that would fail only after minutes of compilation."""
    for name in ("json", "hlo"):
        folder = pathlib.Path(get[name] or "-").parent
        if not folder.is_dir():
            raise UserError(f"--{name}={get[name]} cannot be written: there is no {folder}.")
    if get["examples"] < 1 or get["search_minutes"] < 0 or get["top"] < 0:
        raise UserError("--examples is 1 or more, and --search_minutes and --top not negative.")
    if get["images_per_core"] <= 0:
        raise UserError(f"--images_per_core={get['images_per_core']} is no rate: it is above 0.")


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _validate(config: ConfigDict) -> None:
    """Checks a config as for a run, except that a plan needs no data."""
    checked = copy.deepcopy(config)
    checked.data.source.type = checked.data.source.type or "synthetic"
    validation.validate(checked)


def _write_json(target: str | None, fields: dict[str, Any]) -> bool:
    """Writes the figures as JSON if asked; returns whether the table is wanted too."""
    if target is None:
        return True
    text = json.dumps(fields, indent=2)
    if target == "-":
        print(text)
        return False
    writing.write(locations.parse(target), text + "\n")
    return True


def _silence() -> None:
    """Silences JAX's warnings of CPUs and compilation, which mean nothing for a plan."""
    warnings.filterwarnings("ignore", module="jax.*")
    os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "0")
