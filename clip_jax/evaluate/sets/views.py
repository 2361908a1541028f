"""Sources cut and relabelled: what stands between a split on disk and a data set."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from clip_jax.data.sources import reading
from clip_jax.data.sources.base import Example, Source
from clip_jax.errors import UserError


class Part:
    """A part of a source, drawn at random once and for all.

    Attributes:
      class_names, templates, problems: of the source.
    """

    def __init__(self, source: Source, share: float, last: bool):
        """Draws nothing but numbers.

        Args:
          source: to take from.
          share: of its examples, at least one, that are set apart.
          last: whether this part is those, or the others.
        """
        self.class_names, self.templates = source.class_names, source.templates
        self.problems: Counter[str] = Counter(getattr(source, "problems", {}))
        self._source = source
        # RandomState, since its order is frozen by NumPy's policy.
        order = np.random.RandomState(0).permutation(len(source))
        apart = max(round(len(source) * share), 1)
        self._places = np.sort(order[:apart] if last else order[apart:]).astype(np.int32)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Example:
        return self._source[int(self._places[index])]

    def start(self, indices: Sequence[int]) -> list[Callable[[], Example]]:
        """Begins to read examples, as `reading.start` does."""
        return reading.start(self._source, self._places[indices].tolist())


class Relabelled:
    """A source with the labels of a data set.

    Attributes:
      class_names: of the data set.
      templates: none: they are the data set's.
      problems: of the source.
    """

    templates: tuple[str, ...] = ()

    def __init__(self, source: Source, numbers: np.ndarray, class_names: tuple[str, ...]):
        """Reads nothing.

        Args:
          source: to relabel.
          numbers: the new label of each of its labels, int [n]; -1: none.
          class_names: of the new labels.
        """
        self.class_names = class_names
        self.problems: Counter[str] = Counter(getattr(source, "problems", {}))
        self._source = source
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        """May raise UserError too: the example has a label beyond those known."""
        return self._relabel(lambda: self._source[index])

    def start(self, indices: Sequence[int]) -> list[Callable[[], Example]]:
        """Begins to read examples, as `reading.start` does."""
        begun = reading.start(self._source, indices)
        return [functools.partial(self._relabel, read) for read in begun]

    def _relabel(self, read: Callable[[], Example]) -> Example:
        example = read()
        labels = [self._number(label, example.key) for label in example.labels]
        known = tuple(dict.fromkeys(label for label in labels if label >= 0))
        return dataclasses.replace(example, labels=known)

    def _number(self, label: int, key: str) -> int:
        if label >= len(self._numbers):
            raise UserError(
                f"The example {key} has the label {label}, but there are {len(self._numbers)} "
                "classes, numbered from 0."
            )
        return int(self._numbers[label])
