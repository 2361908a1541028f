"""Classes as found in files, numbered."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from clip_jax.errors import UserError


def number_labels(values: Sequence[Any]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class labels as found in a file -> numbers and names.

    Args:
      values: per example; None: no label. Integers stand for themselves, anything else for a
        name, numbered in sorted order.

    Returns:
      int32 [n], -1: none; and the names, empty where the labels are integers already.

    Raises:
      UserError: no example has a label.
    """
    known = [value for value in values if value is not None]
    if not known:
        raise UserError("No example has a class under source.label_key; is it misspelt?")
    if all(_is_integer(value) for value in known):
        return np.array([-1 if v is None else int(v) for v in values], np.int32), ()
    return number_names([None if value is None else str(value) for value in values])


def number_names(values: Sequence[str | None]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class names (None: no class) -> int32 [n], -1: none; and the names in sorted order."""
    names = sorted({value for value in values if value is not None})
    number = {None: -1} | {name: index for index, name in enumerate(names)}
    return np.array([number[value] for value in values], np.int32), tuple(names)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and value.isdecimal())
