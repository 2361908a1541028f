"""Maps the classes of a source to those of a data set.

Sources number their classes as they please. Where they name them, the names decide: compared
without case, accents, spaces and punctuation, and with the aliases that the set's file lists.
"""

import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from clip_jax.errors import UserError
from clip_jax.evaluate.sets.dataset import Dataset

_SHOWN = 3  # names in a message


def match(
    dataset: Dataset, base: Dataset | None, names: Sequence[str], where: str
) -> Int32[np.ndarray, " source_classes"]:
    """Matches each class of a source with a class of the set.

    Args:
      dataset: the set.
      base: reference set that it is a shift of; None: none.
      names: names of the source's classes, by label; empty: it has only their numbers.
      where: name of the source in messages.

    Returns:
      The label in the set; -1: a class that is not evaluated.

    Raises:
      UserError: some classes are not found; it names the first ones.
    """
    classes = len(dataset.class_names)
    if not names:
        if dataset.naming.numbered:
            return np.arange(classes, dtype=np.int32)
        raise UserError(
            f"The labels in {where} are numbers, and in which order they count the classes of "
            f"{dataset.name} is not known. Put the names into classnames.txt above the shards, one "
            "in a line by label, or name the folders by class."
        )
    keys = list(map(key, names))
    for ordered in (dataset.class_names, *dataset.class_sets.values()):
        if _agree(keys, ordered):
            return np.arange(classes, dtype=np.int32)
    if dataset.naming.numbered and all(name.isdecimal() for name in names):
        numbers = np.array([int(name) for name in names], np.int32)
        check_numbers(int(numbers.max()), dataset, where)
        return numbers
    known = lookup(dataset)
    ignored = {key(name) for name in dataset.naming.ignored} | set(lookup(base) if base else ())
    if unknown := [n for n, k in zip(names, keys) if k not in known and k not in ignored]:
        raise UserError(
            f"{len(unknown)} of {len(names)} classes in {where} are not classes of {dataset.name}: "
            f"{', '.join(map(repr, unknown[:_SHOWN]))}{', ...' if len(unknown) > _SHOWN else ''}. "
            f"Its classes are {', '.join(map(repr, dataset.class_names[:_SHOWN]))}, ...; rename "
            "those of the data, or describe the set in a JSON file of your own, with aliases."
        )
    return np.array([known.get(k, -1) for k in keys], np.int32)


def match_given(
    class_names: Sequence[str], names: Sequence[str], by_name: bool, where: str
) -> Int32[np.ndarray, " source_classes"]:
    """Matches each class of a source with one of the names that a config gives.

    Args:
      class_names: names by label, alternatives joined by "|".
      names: names of the source's classes, by its label; empty: it has only their numbers.
      by_name: whether the source numbers its classes by their names; else the numbers are its own.
      where: name of the source in messages.

    Returns:
      The place of the name among those given.

    Raises:
      UserError: it cannot be told which name belongs to which class.
    """
    places, keys = np.arange(len(class_names), dtype=np.int32), list(map(key, names))
    if not names or _agree(keys, class_names):
        return places
    if all(name.isdecimal() for name in names):
        numbers = np.array([int(name) for name in names], np.int32)
        if numbers.max() >= len(class_names):
            raise UserError(
                f"There is a class {numbers.max()} in {where}, but {len(class_names)} class names "
                "are given, which are numbered from 0."
            )
        return numbers
    known = {key(name): i for i, each in enumerate(class_names) for name in each.split("|")}
    found = [known.get(k, -1) for k in keys]
    if min(found) >= 0 and len(set(found)) == len(found):
        return np.array(found, np.int32)
    in_place = all(place in (-1, i) for i, place in enumerate(found))
    if not by_name and in_place and len(names) == len(class_names):
        return places
    unknown = next((n for n, place in zip(names, found) if place < 0), names[0])
    raise UserError(
        f"The class names that are given do not say which of them is the class {unknown!r} of "
        f"{where}. Give every class its name in the data, in any order, or leave the names out; "
        "for other words in the prompts describe the set in a JSON file, with class_names and the "
        "data's names as ids (clip_jax/evaluate/sets/README.md), and name it by eval.datasets."
    )


def spoken(name: str) -> str:
    """Returns a class name, as folders have them, in the form for a prompt."""
    return name.replace("/", " ").replace("_", " ")


def check_numbers(largest: int, dataset: Dataset, where: str) -> None:
    """Checks that the largest label is a class of the set; UserError where it is not."""
    if largest >= len(dataset.class_names):
        raise UserError(
            f"There is a label {largest} in {where}, but {dataset.name} has "
            f"{len(dataset.class_names)} classes, numbered from 0."
        )


def lookup(dataset: Dataset) -> dict[str, int]:
    """Returns the label of every name that stands for one class alone, by the name's `key`."""
    found: dict[str, set[int]] = {}
    sets = (dataset.class_names, *dataset.class_sets.values(), dataset.naming.ids)
    for names in sets:
        for label, alternatives in enumerate(names):
            for name in (alternatives, *alternatives.split("|")):
                found.setdefault(key(name), set()).add(label)
    for alias, name in dataset.naming.aliases.items():
        if len(labels := found.get(key(name), set())) != 1:
            raise UserError(
                f"The alias {alias!r} of {dataset.name} is to stand for {name!r}, which is the "
                f"name of {len(labels)} of its classes."
            )
        found[key(alias)] = labels
    return {k: next(iter(labels)) for k, labels in found.items() if len(labels) == 1}


def key(name: str) -> str:
    """Reduces a name to letters and digits, in lower case and without accents, to compare it."""
    plain = unicodedata.normalize("NFKD", name).casefold()
    return "".join(filter(str.isalnum, plain)) or name


def _agree(keys: Sequence[str], names: Sequence[str]) -> bool:
    """Tells whether these are the same classes in the same order; two may share a name then."""
    return len(keys) == len(names) and all(
        k == key(name) or k in map(key, name.split("|")) for k, name in zip(keys, names)
    )
