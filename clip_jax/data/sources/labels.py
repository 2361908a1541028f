"""Numbering of the classes found in files, and the groups that examples belong to."""

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from clip_jax.errors import UserError

_LARGEST = 2**31 - 1  # class id
_NUMBER = re.compile(r"-?[0-9]{1,18}(\.0*)?")
_SPARSEST = 2  # ids per class that folders named by numbers may span


class Labels:
    """The classes of many examples, each of which may have none, one or several."""

    def __init__(self, lists: Sequence[Sequence[int]]):
        """Flattens lists of class ids, one per example, into two arrays."""
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
      values: label of each example. None and NaN mean no label, a list several. If all labels are
        whole numbers, however they are written (3, 3.0, "3", "003"), they are ids, and negative
        ones mean no label. Otherwise they are names, numbered in sorted order.

    Returns:
      The ids, and the names by id; () if the labels were numbers.

    Raises:
      UserError: no example has a label, or a number is none of a class.
    """
    lists = [_listed(value) for value in values]
    known = dict.fromkeys(itertools.chain.from_iterable(lists))
    if not known:
        raise UserError("No example has a class under source.label_key; is it misspelt?")
    numbers = {value: _number(value) for value in known}
    if None not in numbers.values():
        ids = [[int(numbers[value]) for value in each] for each in lists]
        return Labels([list(dict.fromkeys(n for n in each if n >= 0)) for each in ids]), ()
    if odd := [value for value in known if not isinstance(value, str) and _number(value) is None]:
        raise UserError(
            f"The class {odd[0]!r} under source.label_key is no whole number from 0 to {_LARGEST:,}"
            " and no name; is it the field of the class?"
        )
    return number_names([[_name(value) for value in each] for each in lists])


def number_names(lists: Sequence[Sequence[str]]) -> tuple[Labels, tuple[str, ...]]:
    """Numbers class names, given by example; returns the ids by example, and the names by id.

    Names that are all numbers, such as folders from 0 to 999, are the ids themselves, unless most
    ids up to the largest would be of no class. Others are numbered in sorted order.
    """
    names = sorted(set(itertools.chain.from_iterable(lists)))
    number = {name: index for index, name in enumerate(names)}
    ids = {name: _number(name) for name in names}
    found = [n for n in ids.values() if n is not None and n >= 0]
    if len(set(found)) == len(names) and max(found) < _SPARSEST * len(names):
        number = {name: int(n) for name, n in ids.items() if n is not None}
        named = {n: name for name, n in number.items()}
        names = [named.get(n, str(n)) for n in range(max(found) + 1)]
    return Labels([[number[name] for name in each] for each in lists]), tuple(names)


def parse_groups(group_keys: str) -> tuple[str, ...]:
    """Splits a list of keys such as "gender,race"."""
    return tuple(filter(None, (key.strip() for key in group_keys.split(","))))


def group(value: Any) -> str:
    """Returns the value of a field as the name of a group; "": none."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return "" if value is None else str(value)


def _listed(value: Any) -> list[Any]:
    """Returns the labels of an example, each once, in the order found."""
    values = value if isinstance(value, (list, tuple)) else [value]
    # NaN: a cell that pandas left empty.
    known = (each for each in map(_plain, values) if each is not None and each == each)
    return list(dict.fromkeys(known))


def _plain(value: Any) -> Any:
    """Returns a number of NumPy as one of Python, and bytes as text; None: it names no class."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, (int, float, str)) else None


def _number(value: Any) -> int | None:
    """Returns the whole number that a label is or spells; None: it is another value or a name."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = int(value.strip().partition(".")[0])
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return int(value) if isinstance(value, int) and abs(value) <= _LARGEST else None


def _name(value: Any) -> str:
    number = _number(value)
    return str(value if isinstance(value, str) or number is None else number)
