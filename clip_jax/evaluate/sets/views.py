"""Sources derived from others: a part of a source, and a source with other labels."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int32

from clip_jax.data.sources import reading
from clip_jax.data.sources.base import Example, Source
from clip_jax.errors import UserError


class Part:
    """A random part of a source, always the same one.

    Attributes:
      class_names, templates, problems: those of the source.
    """

    def __init__(self, source: Source, fraction: float, held_out: bool):
        """Draws the part; reads nothing.

        Args:
          source: the whole.
          fraction: fraction of its examples to hold out, at least one.
          held_out: whether this part is the held-out one, or the others.
        """
        self.class_names, self.templates = source.class_names, source.templates
        self.problems: Counter[str] = Counter(getattr(source, "problems", {}))
        self._source = source
        # RandomState, since its order is frozen by NumPy's policy.
        order = np.random.RandomState(0).permutation(len(source))
        count = max(round(len(source) * fraction), 1)
        self._indices = np.sort(order[:count] if held_out else order[count:]).astype(np.int32)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self._source[int(self._indices[index])]

    def start(self, indices: Sequence[int]) -> list[Callable[[], Example]]:
        """Starts to read examples, as `reading.start` does."""
        return reading.start(self._source, self._indices[indices].tolist())


class Relabelled:
    """A source with the labels of a data set.

    Attributes:
      class_names: those of the data set.
      templates: none, since the data set has its own.
      problems: those of the source.
    """

    templates: tuple[str, ...] = ()

    def __init__(
        self,
        source: Source,
        new_labels: Int32[np.ndarray, " source_classes"],
        class_names: tuple[str, ...],
    ):
        """Reads nothing.

        Args:
          source: the source to relabel.
          new_labels: new label of each of its labels; -1: none.
          class_names: names of the new labels.
        """
        self.class_names = class_names
        self.problems: Counter[str] = Counter(getattr(source, "problems", {}))
        self._source = source
        self._new_labels = new_labels

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        """Reads an example; also raises UserError where its label is beyond those known."""
        return self._relabel(lambda: self._source[index])

    def start(self, indices: Sequence[int]) -> list[Callable[[], Example]]:
        """Starts to read examples, as `reading.start` does."""
        begun = reading.start(self._source, indices)
        return [functools.partial(self._relabel, read) for read in begun]

    def _relabel(self, read: Callable[[], Example]) -> Example:
        example = read()
        labels = [self._new_label(label, example.key) for label in example.labels]
        known = tuple(dict.fromkeys(label for label in labels if label >= 0))
        return dataclasses.replace(example, labels=known)

    def _new_label(self, label: int, key: str) -> int:
        if label >= len(self._new_labels):
            raise UserError(
                f"The example {key} has the label {label}, but there are {len(self._new_labels)} "
                "classes, numbered from 0."
            )
        return int(self._new_labels[label])
