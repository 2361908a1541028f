"""Classes as found in files, numbered; and the groups that examples belong to."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from clip_jax.errors import UserError


class Labels:
    """The classes of many examples, each of which may have none, one or several."""

    def __init__(self, lists: Sequence[Sequence[int]]):
        """Keeps them in two flat arrays; `lists`: class indices by example."""
        self._first = np.cumsum([0, *map(len, lists)])
        self._flat = np.fromiter(itertools.chain.from_iterable(lists), np.int32)

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, index: int) -> tuple[int, ...]:
        return tuple(self._flat[self._first[index] : self._first[index + 1]].tolist())

    @property
    def largest(self) -> int:
        """The largest class index; -1: no example has a class."""
        return int(self._flat.max(initial=-1))


def number_labels(values: Sequence[Any]) -> tuple[Labels, tuple[str, ...]]:
    """Class labels as found in a file -> numbers and names.

    Args:
      values: per example; None: no label; a list: several. Integers stand for themselves, negative
        ones for no label; anything else for a name, numbered in sorted order.

    Returns:
      The numbers; and the names, empty where the labels are integers already.

    Raises:
      UserError: no example has a label.
    """
    lists = [_listed(value) for value in values]
    known = list(itertools.chain.from_iterable(lists))
    if not known:
        raise UserError("No example has a class under source.label_key; is it misspelt?")
    if all(_is_integer(value) for value in known):
        return Labels([[n for n in map(int, numbers) if n >= 0] for numbers in lists]), ()
    return number_names([list(map(str, names)) for names in lists])


def number_names(lists: Sequence[Sequence[str]]) -> tuple[Labels, tuple[str, ...]]:
    """Class names by example -> their numbers in sorted order, and the names in that order."""
    names = sorted(set(itertools.chain.from_iterable(lists)))
    number = {name: index for index, name in enumerate(names)}
    return Labels([[number[name] for name in each] for each in lists]), tuple(names)


def parse_groups(group_keys: str) -> tuple[str, ...]:
    """ "gender,race" -> its keys."""
    return tuple(filter(None, (key.strip() for key in group_keys.split(","))))


def group(value: Any) -> str:
    """What a field holds, as the name of a group; "": nothing."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return "" if value is None else str(value)


def _listed(value: Any) -> list[Any]:
    """Each once, in the order found."""
    if value is None:
        return []
    return list(dict.fromkeys(value)) if isinstance(value, (list, tuple)) else [value]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) or (
        isinstance(value, str) and value.removeprefix("-").isdecimal()
    )
