"""Reads the descriptions of data sets: JSON files, and directories of the user's own.

README.md in this directory lists the fields of a JSON file.
"""

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from clip_jax.choices import TEMPLATES
from clip_jax.data.sources import tar_labels
from clip_jax.errors import UserError
from clip_jax.evaluate.sets import classes, dataset, directories
from clip_jax.evaluate.sets.dataset import Dataset, Location, Naming, Table, Tfds
from clip_jax.storage import locations, ranges

# Directory names by split. Where there is none for validation, a part of "train" stands in.
_SPLIT_NAMES = {
    "train": ("train", "trainval"),
    "validation": ("validation", "valid", "val"),
    "test": ("test",),
}
_LOCATION_PARTS = {"tfds": Tfds, "table": Table}
# Former names of fields.
_RENAMED = {"left_out": "ignored", "validation_share": "validation_fraction"}


def read(text: str | bytes, name: str, file: str) -> Dataset:
    """Reads the data set that a file describes, unchecked.

    Args:
      text: contents of the file.
      name: name of the set.
      file: name of the file in messages.

    Raises:
      UserError: it is no JSON, or has unknown, missing or misshapen fields.
    """
    try:
        record = json.loads(text)
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}.") from None
    if not isinstance(record, dict):
        raise UserError(f"{file} must hold one JSON object that describes a data set.")
    fields = {"title": name, "kind": "classification", **record, "name": name}
    fields.setdefault("metric", "accuracy" if fields["kind"] == "classification" else "")
    where = _object(fields.get("where", {}), f'"where" of {file}')
    parts = {
        key: _build(cls, _object(where[key], f'"{key}" of {file}'), f'"{key}" of {file}')
        for key, cls in _LOCATION_PARTS.items()
        if key in where
    }
    placed = any(key in where for key in ("tfds", "table", "digits"))
    splits = {} if placed and not (where.keys() & {"path", "directories"}) else _SPLIT_NAMES
    fields["where"] = _build(Location, {"splits": splits, **where, **parts}, f'"where" of {file}')
    naming = _object(fields.get("naming", {}), f'"naming" of {file}')
    fields["naming"] = _build(Naming, naming, f'"naming" of {file}')
    fields["prompts"] = _prompts(_object(fields.get("prompts", {}), f'"prompts" of {file}'), file)
    if isinstance(numbers := fields.get("base_classes"), list):
        fields["base_classes"] = [n if isinstance(n, list) else [n] for n in numbers]
    return _build(Dataset, fields, file)


def read_path(path: epath.Path, get: Callable[[str], Dataset]) -> Dataset:
    """Reads a data set of the user's own.

    Args:
      path: a .json file or a directory.
      get: finds the set that a shift names as its base.

    Raises:
      UserError: it describes no data set that can be evaluated.
    """
    if path.is_dir():
        return _directory(path)
    if path.suffix != ".json":
        raise UserError(
            f"{path} is no data set: give a directory of class-named folders, or a .json file."
        )
    found = read(ranges.read(path), path.stem, str(path))
    where = found.where
    if where.tfds is None and not (where.directories or where.digits):
        where = dataclasses.replace(where, path=str(path.parent / locations.parse(where.path)))
    found = dataclasses.replace(found, where=where)
    if found.base and found.class_names:
        dataset.check_base(found, get(found.base))
    elif found.base:
        found = dataset.inherit(found, get(found.base))
    if found.kind == "classification" and not found.class_names:
        found = dataclasses.replace(found, **_classes(epath.Path(where.path), found))
    if found.kind == "classification" and not found.prompts:
        found = dataclasses.replace(found, prompts={"own": TEMPLATES})
    return dataset.check(found)


def _directory(root: epath.Path) -> Dataset:
    """Describes a set by its directory alone."""
    layout = tar_labels.read_layout(root)
    where = Location(path=str(root), splits=_splits(root))
    name = root.name or str(root)
    found = Dataset(name, name, "classification", "accuracy", where=where)
    if layout.type == "retrieval":
        return dataclasses.replace(found, kind="retrieval", metric="")
    if layout.type == "multilabel":
        found = dataclasses.replace(found, metric="map_11_point", multi_label=True)
    found = dataclasses.replace(found, **_classes(root, found))
    return dataset.check(dataclasses.replace(found, prompts={"own": layout.templates or TEMPLATES}))


def _splits(root: epath.Path) -> dict[str, tuple[str, ...]]:
    """Returns the splits of a directory; where it has other folders too, all are classes."""
    folders = {name.partition("/")[0] for name in locations.tree(root) if "/" in name}
    folders = {name for name in folders if name[0] != "."}
    names = {name for names in _SPLIT_NAMES.values() for name in names}
    if folders and folders <= names:
        return {split: names for split, names in _SPLIT_NAMES.items() if folders & set(names)}
    return {"test": ()}


def _classes(root: epath.Path, found: Dataset) -> dict:
    """Reads the class names from a directory, as fields of the set."""
    if not found.where.path:
        raise UserError(f"The description of {found.name} must list its class_names.")
    if names := tar_labels.read_layout(root).class_names:
        naming = dataclasses.replace(found.naming, numbered=True)
        return {"class_names": names, "naming": naming}
    folders = directories.class_folders(root, found.where.splits)
    if not folders:
        raise UserError(
            f"The classes of {root} are not known: it has neither folders named by class (with "
            "images, and none or train/ and test/ above them) nor a classnames.txt, one name in a "
            "line. A JSON file with class_names can describe it; see "
            "clip_jax/evaluate/sets/README.md."
        )
    # The folder is an identifier; its name is what a prompt says.
    spoken = tuple(map(classes.spoken, folders))
    return {"class_names": spoken, "naming": dataclasses.replace(found.naming, ids=folders)}


# ---- Fields of JSON ----------------------------------------------------------------------------


def _build(cls: Any, record: Mapping[str, Any], file: str) -> Any:
    """Builds an instance of a dataclass; UserError where the fields are not its own."""
    known = {field.name: field for field in dataclasses.fields(cls)}
    for key in record:
        if key not in known:
            near = [new for old, new in _RENAMED.items() if old == key and new in known]
            near += difflib.get_close_matches(key, known, n=1)
            meant = f" Is {near[0]!r} meant?" if near else ""
            raise UserError(
                f"{file} has the unknown field {key!r}.{meant} The fields are "
                f"{', '.join(sorted(known.keys() - {'name'}))}."
            )
    for key, value in record.items():
        if problem := _misfit(str(known[key].type), value):
            raise UserError(f"{key!r} in {file} must be {problem}, and is {json.dumps(value):.60}.")
    missing = [
        field.name
        for field in known.values()
        if field.name not in record
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{file} lacks the field {missing[0]!r}.")
    return cls(**{key: _frozen(value) for key, value in record.items()})


def _misfit(wanted: str, value: Any) -> str:
    """Names the type that a JSON value lacks by the annotation of its field; "": it fits."""
    texts = "tuple[str, ...]"
    if wanted.startswith("tuple[tuple[") and not isinstance(value, (list, tuple)):
        return "a list"
    if wanted == "<class 'str'>" and not isinstance(value, str):
        return "a text"
    if wanted == "<class 'bool'>" and not isinstance(value, bool):
        return "true or false"
    if wanted == "<class 'float'>" and not isinstance(value, (int, float)):
        return "a number"
    if "Mapping[" in wanted and not isinstance(value, Mapping):
        return "an object"
    lists = list(value.values()) if isinstance(value, Mapping) else [value]
    if texts in wanted and not all(_are_texts(each) for each in lists):
        return "an object of lists of texts" if "Mapping[" in wanted else "a list of texts"
    return ""


def _are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)


def _object(value: Any, file: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{file} is {value!r:.60}, and must be a JSON object.")
    return value


def _prompts(prompts: Mapping[str, Any], file: str) -> Mapping[str, Any]:
    """Resolves prompts that name others in place of templates."""
    for name, templates in prompts.items():
        if isinstance(templates, str) and not isinstance(prompts.get(templates), list):
            raise UserError(f"The prompts {name!r} of {file} name others, {templates!r}: none.")
    return {name: prompts[t] if isinstance(t, str) else t for name, t in prompts.items()}


def _frozen(value: Any) -> Any:
    """Turns lists into tuples, at any depth."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if isinstance(value, Mapping):
        return {key: _frozen(inner) for key, inner in value.items()}
    return value
