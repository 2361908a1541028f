"""Reads one checkpoint, and tells damage from storage that fails and from a wrong setting."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from clip_jax import checksums
from clip_jax.common import hosts
from clip_jax.errors import StorageError, UserError
from clip_jax.sharding import path_name
from clip_jax.state import TrainState
from clip_jax.storage import faults, ranges, remote

Result = TypeVar("Result")

OWN = "checksum"  # the field of "meta" with the checksum of all others


class Unreadable(UserError):
    """A checkpoint whose files are not what was saved; the message is the reason alone."""


class OtherPrecision(UserError):
    """A checkpoint with arrays of another dtype than the config asks for."""


def items(state: TrainState) -> dict[str, Any]:
    """Returns the arrays of a state by the items of a checkpoint that hold them."""
    parts = {
        "model": state.variables,
        "optimizer": {"step": state.step, "opt_state": state.opt_state},
    }
    return parts if state.ema is None else {**parts, "ema": state.ema}


def to_state(parts: Mapping[str, Any]) -> TrainState:
    """Inverts `items`."""
    return TrainState(**parts["model"], **parts["optimizer"], ema=parts.get("ema"))


def describe(step: int, meta: Mapping[str, Any], found: Mapping[str, int]) -> dict[str, Any]:
    """Returns the item "meta" of a checkpoint.

    Args:
      step: step of the checkpoint.
      meta: description of the run.
      found: checksums of the arrays, by path.
    """
    # As JSON gives it back, which knows no tuples and no numbers as keys.
    described = json.loads(json.dumps({"step": step, **meta, "checksums": found}))
    described[OWN] = checksums.of_json(described)
    return described


def read(folder: epath.Path, **args: Any) -> dict[str, Any]:
    """Reads "meta" and the items of `args`, without waiting for other hosts.

    Raises:
      Unreadable: a file is missing, cut short or nonsense, or the arrays are of another model.
      StorageError: the storage fails, which says nothing about the checkpoint.
    """
    wanted = ocp.args.Composite(meta=ocp.args.JsonRestore(), **args)
    try:
        # The handler alone: the manager ends with a barrier, at which a host that has failed would
        # keep the others waiting.
        items = dict(ocp.CompositeCheckpointHandler().restore(folder, args=wanted).items())
    except (MemoryError, jax.errors.JaxRuntimeError):  # of this machine, not of the checkpoint
        raise
    except Exception as error:  # whatever a damaged file makes of the libraries below
        logging.debug("Restoring failed", exc_info=True)
        if not faults.of_the_file(error, folder):
            raise StorageError(f"{folder} could not be read: {faults.explain(error)}") from error
        _check_bucket(folder, [*args])
        raise Unreadable(
            f"it is incomplete, damaged, or of another model ({faults.first_line(error)})"
        ) from error
    meta = items.get("meta")
    if not isinstance(meta, dict) or any(items.get(name) is None for name in args):
        raise Unreadable("it is incomplete: an item is missing")
    own = meta.pop(OWN, None)  # None: of a version that wrote none
    if own is not None and own != checksums.of_json(meta):
        raise Unreadable("its meta/metadata is damaged")
    return items


def _check_bucket(folder: epath.Path, names: list[str]) -> None:
    """Raises StorageError where a bucket refuses to tell whether items are there.

    Libraries that ask it take a failure for "no".
    """
    if not remote.is_remote(folder):
        return
    for path in [folder / "meta" / "metadata", *(folder / name / "_METADATA" for name in names)]:
        with contextlib.suppress(FileNotFoundError):
            try:
                ranges.read(path)
            except StorageError as error:
                raise StorageError(f"{folder} could not be read: {error}") from error


def verify(items: Mapping[str, Any]) -> None:
    """Compares arrays with the checksums in "meta", which it takes out; every host must call it.

    Raises:
      Unreadable: they differ, or are not finite.
    """
    saved = items["meta"].pop("checksums", None)
    arrays = {name: item for name, item in items.items() if name != "meta"}
    if not arrays:
        return
    found = checksums.inspect(arrays)
    if found.not_finite:
        raise Unreadable(
            f"{len(found.not_finite)} arrays hold NaN or infinity, such as {found.not_finite[0]}"
        )
    damaged = [name for name, n in found.checksums.items() if saved and saved.get(name) != n]
    if damaged:
        raise Unreadable(
            f"{len(damaged)} of {len(found.checksums)} arrays are not what was saved, such as "
            f"{damaged[0]}, so that a file of it is damaged"
        )


def agreed(attempt: Callable[[], Result]) -> Result:
    """Returns the result of `attempt`; every host must call it.

    Raises:
      Unreadable: it could not be read, be it on one host alone.
      OtherPrecision: likewise.
    """
    result, own = None, None
    try:
        result = attempt()
    except (Unreadable, OtherPrecision) as error:
        own = error
    told = [json.loads(text) for text in hosts.gather(json.dumps([type(own).__name__, str(own)]))]
    if own is not None:
        raise own
    for host, (kind, reason) in enumerate(told):
        if kind == OtherPrecision.__name__:
            raise OtherPrecision(reason)
        if kind == Unreadable.__name__:
            raise Unreadable(f"host {host} says that {reason}")
    return cast(Result, result)


def check_precision(folder: epath.Path, stored: Any, like: TrainState) -> None:
    """Raises OtherPrecision where arrays would be cast, which loses precision or feigns it.

    Args:
      folder: the checkpoint.
      stored: orbax's metadata of its items.
      like: the state that is asked for.
    """
    try:
        saved = {**_dtypes(stored["model"]), **_dtypes(stored["optimizer"])}
    except Exception:  # damaged: reading it will tell
        return
    wanted = {**_dtypes(items(like)["model"]), **_dtypes(items(like)["optimizer"])}
    other = [name for name, dtype in wanted.items() if saved.get(name, dtype) != dtype]
    if other:
        name = other[0]
        raise OtherPrecision(
            f"The checkpoint {folder} keeps {len(other)} arrays in another precision than the "
            f"config, such as {name} in {saved[name]} instead of {wanted[name]}: set "
            "--config.optim.moment_dtype and --config.optim.bf16_params to what the run began "
            "with, or start from its model alone, with --config.init_from, in another --workdir."
        )


def _dtypes(tree: Any) -> dict[str, str]:
    """Returns the dtypes by path, of arrays, shapes or orbax's metadata."""
    tree = getattr(tree, "tree", tree)
    return {path_name(path): str(leaf.dtype) for path, leaf in jax.tree.leaves_with_path(tree)}


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Silences absl's warnings, which orbax gives freely."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
