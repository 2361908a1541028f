"""Numbering of the classes found in files, and the groups that examples belong to."""

import decimal
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clip_jax.errors import UserError

_LARGEST = 10_000_000  # class ids; beyond it they are identifiers of something else
_ENDLESS = re.compile(r"[-+]?\d{19,}(\.\d*)?")  # a number that no format of data has room for


class Labels:
    """The classes of many examples, each of which may have none, one or several.

    Attributes:
      by_name: whether the ids are places among the sorted names, not the data's own numbers.
    """

    def __init__(self, lists: Sequence[Sequence[int]], by_name: bool = False):
        """Flattens lists of class ids, one per example, into two arrays."""
        self.by_name = by_name
        self._first = np.cumsum([0, *map(len, lists)])
        self._flat = np.fromiter(itertools.chain.from_iterable(lists), np.int32)

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, index: int) -> tuple[int, ...]:
        return tuple(self._flat[self._first[index] : self._first[index + 1]].tolist())

    @property
    def largest(self) -> int:
        """The largest class id; -1 if no example has a class."""
        return int(self._flat.max(initial=-1))


def number_labels(values: Sequence[Any]) -> tuple[Labels, tuple[str, ...]]:
    """Converts class labels as found in a file to class ids and names.

    Args:
      values: label of each example. None, NaN, "", a list in a list, an object, or a number beyond
        64 bits means no label, a list several. If all labels are whole numbers, also as floats or
        as text ("3", "3.0", "007"), they are ids; -1 means no label. Otherwise they are names,
        numbered in their order.

    Returns:
      The ids, and the names by id; () if the labels were numbers.

    Raises:
      UserError: no example has a label, or the labels can be neither ids nor names.
    """
    lists = [_listed(value) for value in values]
    known = list(dict.fromkeys(itertools.chain.from_iterable(lists)))
    if not known:
        raise UserError("No example has a class under source.label_key; is it misspelt?")
    found = {label: _number(label) for label in known}
    if any(number is None for number in found.values()):
        return number_names([list(dict.fromkeys(map(_name, labels))) for labels in lists])
    _check_numbers(found)
    ids = [dict.fromkeys(found[label] for label in labels) for labels in lists]
    if all(not each or set(each) == {-1} for each in ids):
        raise UserError("All labels under source.label_key are -1, which means no class.")
    return Labels([[number for number in each if number >= 0] for each in ids]), ()


def number_names(lists: Sequence[Sequence[str]]) -> tuple[Labels, tuple[str, ...]]:
    """Numbers class names in their order; returns the ids by example, and the names by id.

    The order is alphabetical, but names that are numbers come first, by their value. Folders 0 to
    999 are numbered by their names so.
    """
    names = sorted(set(itertools.chain.from_iterable(lists)), key=name_order)
    number = {name: index for index, name in enumerate(names)}
    ids = [[number[name] for name in each] for each in lists]
    return Labels(ids, by_name=True), tuple(names)


def class_ids(value: Any) -> tuple[int, ...]:
    """Returns the class ids that one example has, as `number_labels` does for numbers."""
    found = {label: _number(label) for label in _listed(value)}
    _check_numbers(found)
    return tuple(dict.fromkeys(number for number in found.values() if number >= 0))


# Settings that name groups, for messages: what else training reads of a pair is read as one.
GROUP_SETTINGS = "group_keys, source.teacher_keys or source.weight_key"


def parse_groups(group_keys: str) -> tuple[str, ...]:
    """Splits a list of keys such as "gender,race"."""
    return tuple(filter(None, (key.strip() for key in group_keys.split(","))))


def group(value: Any) -> Any:
    """Returns the value of a field as the name of a group, "" for none; a list stays as it is."""
    if isinstance(value, (list, tuple)) or getattr(value, "ndim", 0):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return "" if value is None else str(value)


def _listed(value: Any) -> list[Any]:
    """Returns the labels of an example, each once, in the order found."""
    value = value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
    several = value if isinstance(value, (list, tuple)) else [value]
    if several is value and any(isinstance(each, bool) for each in several):
        raise UserError(
            f"A label is a list of true and false, {several!r:.80}: source.label_key takes the "
            "list of the classes that are true."
        )
    found = [_plain(each) for each in several]
    return list(dict.fromkeys(each for each in found if each is not None))


def _plain(label: Any) -> str | int | float | None:
    """Returns a label as a text or number; None where it stands for no label."""
    label = label.tolist() if isinstance(label, np.generic) else label
    if isinstance(label, bytes):
        label = label.decode("utf-8", "replace")
    if isinstance(label, (list, tuple, dict, set)):
        return None  # of one odd row: it must not end a run
    if isinstance(label, str):
        label = label.strip()
        return None if not label or _ENDLESS.fullmatch(label) else label
    if label is None or label != label:  # NaN, as pandas writes a missing number
        return None
    if isinstance(label, int) and abs(label) >= 2**63:
        return None
    if isinstance(label, (bool, int, float)):
        return label
    return float(label) if isinstance(label, decimal.Decimal) else str(label)


def _number(label: Any) -> Any:
    """Returns the number that a label is or spells; None: it is a name."""
    if not isinstance(label, str):
        return int(label) if isinstance(label, int) or label.is_integer() else label
    if label.removeprefix("-").isdecimal():
        return int(label)
    if re.fullmatch(r"[-+]?\d+\.\d*(e[-+]?\d+)?", label):
        return _number(float(label))
    return None


def _check_numbers(found: Mapping[Any, Any]) -> None:
    """Raises UserError where some of the numbers cannot be class ids."""
    spelt: dict[int, str] = {}
    for label, number in found.items():
        if not isinstance(number, int):
            why = "is no whole number"
        elif number < -1:
            why = "is negative, and only -1 has a meaning: no class"
        elif number > _LARGEST:
            why = "is too large to be the number of a class"
        elif isinstance(label, str) and label.isdecimal():
            if spelt.setdefault(number, label) == label:
                continue
            why = f"and {spelt[number]!r} are the same number"
        else:
            continue
        raise UserError(
            f"The labels under source.label_key are numbers, and so the ids of their classes, but "
            f"{label!r} {why}. Write names in their place, or number the classes from 0."
        )


def name_order(name: str) -> tuple[int, int, str]:
    """Returns a key to sort class names by: numbers by their value, then texts."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def _name(label: Any) -> str:
    return str(_number(label)) if isinstance(label, float) else str(label)
