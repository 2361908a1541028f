"""The workdir of a run: made writable, its config written, compared at every resume."""

import copy
import fnmatch
import json
import re
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from clip_jax.configs import default
from clip_jax.errors import UserError
from clip_jax.storage import locations, ranges, remote, writing

FILE = "config.json"  # inside the workdir

# Fields that may differ between a run and its resumption: they change where and how it computes,
# or what it reports, not the results.
FREE = ("mesh", "step", "eval", "checkpoint", "log", "compilation_cache", "model.scan_layers")
FREE += ("model.remat", "model.text_remat", "model.attention", "model.packing")
FREE += ("accum_steps", "loss.method", "loss.tile")
FREE += (
    "data.threads",
    "data.processes",
    "data.prefetch",
    "data.max_skipped",
    "data.stall_timeout",
)
FREE += ("data.source.path", "data.mixture.*.path", "branch_from")
# Those of the learning rate, which may differ where they give the same rates up to the resumption.
RATES = ("duration", "optim.schedule", "optim.warmup", "optim.timescale", "optim.final_fraction")
RATES += ("optim.cooldown", "optim.cooldown_shape")
# A source of a mixture has the fields of data.source.
_SOURCE = re.compile(r"^data\.mixture\.[^.]+")


def make(workdir: epath.Path) -> None:
    """Creates a workdir and tests that it is writable, before anything slow.

    Raises:
      UserError: it cannot be created or written to.
    """
    far = remote.is_remote(workdir)
    try:
        if not far:
            workdir.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            probe = workdir / "writable"
            writing.write(probe, b"")
            writing.remove(probe)
    except OSError as error:
        if far:
            raise
        raise UserError(
            f"The workdir {workdir} cannot be written to ({error}): choose another --workdir."
        ) from None


def write(workdir: epath.PathLike, config: ConfigDict) -> None:
    """Writes the resolved config; only the first process does."""
    if jax.process_index() == 0:
        writing.write(locations.parse(workdir) / FILE, to_json(config))


def to_json(config: ConfigDict) -> str:
    """Returns the text of config.json."""
    return json.dumps(to_plain(config), indent=2) + "\n"


def check(
    workdir: epath.PathLike,
    config: ConfigDict,
    same_rates: Callable[[ConfigDict], bool],
    branch: bool = False,
) -> None:
    """Compares the config with the one that the checkpoints in the workdir were trained with.

    Args:
      workdir: the workdir.
      config: config of the run that resumes.
      same_rates: tells whether a config that differs in `RATES` alone gives the same learning rates
        up to now.
      branch: whether another run goes on from it, whose batch_size may differ too.

    Raises:
      UserError: settings that change what is learned differ.
    """
    if config.checkpoint.allow_config_change:
        return
    path = locations.parse(workdir) / FILE
    try:
        data = ranges.read(path)
    except FileNotFoundError:
        return
    try:
        stored = json.loads(data)
        if not isinstance(stored, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: delete it, or choose another --workdir.") from None
    changed = differences(stored, to_plain(config))
    if not changed:
        return
    may_differ = (*RATES, *["batch_size"] * branch)
    before = copy.deepcopy(config)
    before.update_from_flattened_dict({name: old for name, old, _ in changed if name in may_differ})
    if all(name in may_differ for name, *_ in changed) and same_rates(before):
        return
    listed = "; ".join(f"{name} was {old!r}, now {new!r}" for name, old, new in changed)
    raise UserError(
        f"{workdir} holds a run with other settings: {listed}. Choose another --workdir, "
        "delete this one to start afresh, or add "
        "--config.checkpoint.allow_config_change=True to resume with the new settings."
    )


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns the fields (dotted) whose values differ and are not `FREE`, with both values.

    Fields of an old run are compared under their new names. Those that came later had the value
    then that is the default now.
    """
    defaults, new = flatten(to_plain(default.get_config())), flatten(new)
    # A setting that is newer than the run had its default.
    old = {name: defaults.get(_SOURCE.sub("data.source", name)) for name in new} | {
        default.RENAMED.get(name, name): value for name, value in flatten(old).items()
    }
    return [
        (name, old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not _is_free(name)
    ]


def to_plain(config: ConfigDict) -> dict[str, Any]:
    """Returns a config as JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(config.to_dict()))


def _is_free(name: str) -> bool:
    return any(fnmatch.fnmatch(name, free) or name.startswith(free + ".") for free in FREE)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested fields by dotted name."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
