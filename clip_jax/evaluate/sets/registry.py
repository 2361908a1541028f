"""Data sets by name: those of this package, and the user's own by path."""

import dataclasses
import difflib
import functools
import importlib.resources
import json
from collections.abc import Mapping

from clip_jax.errors import UserError
from clip_jax.evaluate.sets import dataset, descriptions
from clip_jax.evaluate.sets.dataset import Dataset
from clip_jax.storage import locations

_SETS = importlib.resources.files("clip_jax.evaluate.sets") / "definitions"
_COLLECTIONS = "collections.json"


@functools.cache
def names() -> tuple[str, ...]:
    """Returns the names of all data sets of this package, sorted."""
    files = (file.name for file in _SETS.iterdir() if file.name.endswith(".json"))
    return tuple(sorted(name.removesuffix(".json") for name in files if name != _COLLECTIONS))


@functools.cache
def collections() -> Mapping[str, tuple[str, ...]]:
    """Returns the data sets of each collection, in the order of their tables."""
    stored = json.loads((_SETS / _COLLECTIONS).read_text("utf-8"))
    return {name: tuple(members) for name, members in stored.items()}


def get(name: str) -> Dataset:
    """Returns the data set of this name, or the one at this path.

    Raises:
      UserError: there is neither; or what is at the path describes no data set.
    """
    if name in names():
        return _load(name)
    path = locations.parse(name)
    if path.exists():
        return descriptions.read_path(path, get)
    near = difflib.get_close_matches(name, [*names(), *collections()], n=3, cutoff=0.5)
    meant = f" Are these meant: {', '.join(near)}?" if near else ""
    raise UserError(
        f"There is no data set {name!r}, and no file or directory of this name.{meant} Sets: "
        f"{', '.join(names())}; collections: {', '.join(collections())}; your own: the path of a "
        "directory of class-named folders, or of a JSON file that describes it."
    )


def resolve(wanted: str) -> list[Dataset]:
    """Returns the data sets of a comma-separated list, each once.

    Args:
      wanted: names of sets and collections, and paths, such as "paper27,digits,my/folder".

    Raises:
      UserError: `get` raises it, or the list is empty.
    """
    items = [item.strip() for item in wanted.split(",") if item.strip()]
    if not items:
        raise UserError("No data set is named: give some, as in --datasets=digits,paper27.")
    expanded = [name for item in items for name in collections().get(item, (item,))]
    return [get(name) for name in dict.fromkeys(expanded)]


def base_of(shift: Dataset) -> Dataset | None:
    """Returns the reference set that this one is a shift of; None: it is no shift."""
    return get(shift.base) if shift.base else None


@functools.cache
def _load(name: str) -> Dataset:
    """Loads a set of this package; a shift without class names takes those of its base."""
    found = descriptions.read((_SETS / f"{name}.json").read_bytes(), name, f"{name}.json")
    containing = tuple(each for each, members in collections().items() if name in members)
    found = dataclasses.replace(found, collections=containing)
    base = base_of(found)
    if base is not None and not found.class_names:
        found = dataset.inherit(found, base)
    return dataset.check(found)
