"""Data sets as JSON files describe them; README.md in this directory lists the fields."""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any

from clip_jax.errors import UserError
from clip_jax.evaluate.sets.dataset import Dataset, Naming, Table, Tfds, Where

# Of a set in directories. Where there is none for validation, a part of "train" stands in.
SPLITS = {
    "train": ("train", "trainval"),
    "validation": ("validation", "valid", "val"),
    "test": ("test",),
}
_WHERE_PARTS = {"tfds": Tfds, "table": Table}


def read(text: str | bytes, name: str, file: str) -> Dataset:
    """The data set that a file describes, unchecked.

    Args:
      text: contents of the file.
      name: of the set.
      file: names the file in messages.

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
        for key, cls in _WHERE_PARTS.items()
        if key in where
    }
    placed = any(key in where for key in ("tfds", "table", "digits"))
    splits = {} if placed and not (where.keys() & {"path", "directories"}) else SPLITS
    fields["where"] = _build(Where, {"splits": splits, **where, **parts}, f'"where" of {file}')
    naming = _object(fields.get("naming", {}), f'"naming" of {file}')
    fields["naming"] = _build(Naming, naming, f'"naming" of {file}')
    fields["prompts"] = _prompts(_object(fields.get("prompts", {}), f'"prompts" of {file}'), file)
    if isinstance(numbers := fields.get("base_classes"), list):
        fields["base_classes"] = [n if isinstance(n, list) else [n] for n in numbers]
    return _build(Dataset, fields, file)


def _build(cls: Any, record: Mapping[str, Any], file: str) -> Any:
    """An instance of a dataclass; UserError where the fields are not its own."""
    known = {field.name: field for field in dataclasses.fields(cls)}
    for key in record:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
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
    """What a JSON value should be by the annotation of its field; "": it is."""
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
    """A name in place of templates stands for the prompts of that name."""
    for name, templates in prompts.items():
        if isinstance(templates, str) and not isinstance(prompts.get(templates), list):
            raise UserError(f"The prompts {name!r} of {file} name others, {templates!r}: none.")
    return {name: prompts[t] if isinstance(t, str) else t for name, t in prompts.items()}


def _frozen(value: Any) -> Any:
    """Lists as tuples, at any depth."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if isinstance(value, Mapping):
        return {key: _frozen(inner) for key, inner in value.items()}
    return value
