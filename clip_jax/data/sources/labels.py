"""Numbering of the classes found in files, and the groups that examples belong to."""

import itertools
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from clip_jax.errors import UserError


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
      values: label of each example. None means no label, a list several. If all labels are
        integers, they are ids; negative ones, and ones beyond 32 bits, mean no label. Otherwise
        they are names, numbered in sorted order.

    Returns:
      The ids, and the names by id; () if the labels were integers.

    Raises:
      UserError: no example has a label.
    """
    lists = [_listed(value) for value in values]
    known = list(itertools.chain.from_iterable(lists))
    if not known:
        raise UserError("No example has a class under source.label_key; is it misspelt?")
    if all(_is_integer(value) for value in known):
        return Labels([list(filter(_is_id, map(_number, numbers))) for numbers in lists]), ()
    return number_names([list(map(str, names)) for names in lists])


def number_names(lists: Sequence[Sequence[str]]) -> tuple[Labels, tuple[str, ...]]:
    """Numbers class names in sorted order; returns the ids by example, and the names by id."""
    names = sorted(set(itertools.chain.from_iterable(lists)))
    number = {name: index for index, name in enumerate(names)}
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
    if value is None:
        return []
    listed = value if isinstance(value, (list, tuple)) else [value]
    # Neither a list in a list nor an object names a class.
    return list(dict.fromkeys(each for each in listed if isinstance(each, Hashable)))


def _number(value: Any) -> int:
    try:
        return int(value)
    except ValueError:  # thousands of digits
        return -1


def _is_id(number: int) -> bool:
    return 0 <= number <= np.iinfo(np.int32).max


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) or (
        isinstance(value, str) and value.removeprefix("-").isdecimal()
    )
