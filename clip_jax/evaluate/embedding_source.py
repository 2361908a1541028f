"""What tasks work on: embedded splits of data sets and embedded texts, from wherever they come."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from clip_jax.data.sources.base import Source
from clip_jax.errors import UserError
from clip_jax.evaluate.measures.metrics import METRICS
from clip_jax.evaluate.sets.dataset import Dataset, check_classes

TRAIN, VALIDATION, TEST = "train", "validation", "test"


@dataclasses.dataclass(frozen=True)
class Split:
    """The n usable examples of a split.

    Attributes:
      table: their `retrieval.reader.Row`s, as columns.
      embeds: of the images, float32 [n, e], L2-normalised.
      features: what linear probes read, float32 [n, f].
      skipped: the other examples, by reason.
      rows: numbers of these examples among all usable ones, int64 [n].
    """

    table: pa.Table
    embeds: np.ndarray
    features: np.ndarray
    skipped: Mapping[str, int]
    rows: np.ndarray

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def indices(self) -> np.ndarray:
        """Their places in the source, int64 [n]."""
        return self.table["index"].to_numpy()

    @property
    def captions(self) -> list[list[str]]:
        return self.table["captions"].to_pylist()

    @property
    def groups(self) -> list[list[str]]:
        """Of each example, the values of the data set's group keys."""
        return self.table["groups"].to_pylist()

    def take(self, rows: np.ndarray) -> "Split":
        """Some of the examples, by their numbers."""
        return Split(
            self.table.take(pa.array(rows)),
            self.embeds[rows],
            self.features[rows],
            self.skipped,
            self.rows[rows],
        )


class Nearest(NamedTuple):
    """Of n test images.

    Attributes:
      similarity: cosine with the nearest training image, float32 [n].
      rows: of that one among the training images, int32 [n].
    """

    similarity: np.ndarray
    rows: np.ndarray


class Training(Protocol):
    """Training images, as the analysis of overlap needs them.

    Attributes:
      name: of the data, for people.
      parameters: a checksum of the detector of near-duplicates.
    """

    name: str
    parameters: str

    def nearest(self, dataset: Dataset, split: "Split") -> Nearest:
        """Of examples of the test split of a data set."""
        ...

    def picture(self, row: int) -> tuple[str, np.ndarray]:
        """Key and image, uint8 [h, w, 3], of a training example."""
        ...


class Material(Protocol):
    """A model's view of data sets. Every host gets the same, whole arrays.

    Attributes:
      mesh: devices that tasks may compute on.
      scale: the multiplier of similarities, exp(logit_scale); 1 where the model has none.
      embeds_texts: whether the model does.
      can_score_text: whether it does, or scores them for an image.
    """

    mesh: Mesh
    scale: float
    embeds_texts: bool
    can_score_text: bool

    def source(self, dataset: Dataset, role: str) -> Source:
        """The examples of a split; `finding.NotOnDisk` where they are not there."""
        ...

    def split(self, dataset: Dataset, role: str) -> Split:
        """A split, embedded."""
        ...

    def release(self, dataset: Dataset) -> None:
        """Forgets what is held in memory of a data set."""
        ...

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, e], L2-normalised; texts longer than the context are cut."""
        ...

    def scores(
        self, dataset: Dataset, role: str, texts: Sequence[str], owners: np.ndarray, classes: int
    ) -> np.ndarray:
        """Scores of classes for all usable examples of a split, float32 [n, classes].

        For models that embed no texts; `owners`, int [texts], are the classes of the texts.
        """
        ...

    def picture(self, dataset: Dataset, role: str, index: int) -> np.ndarray:
        """An example's image as the model sees it, uint8 [h, w, 3]."""
        ...


def labelled(material: Material, dataset: Dataset, role: str) -> tuple[Split, np.ndarray]:
    """The examples of a split that have a class, and their targets.

    Returns:
      The split without the others, and int32 [n]; or, for a metric of several labels, all of it
      and bool [n, classes].

    Raises:
      UserError: no example has a class, or, but for validation, a class has no example.
    """
    split = material.split(dataset, role)
    lists, count = split.table["labels"].combine_chunks(), len(dataset.class_names)
    values = lists.flatten().to_numpy(zero_copy_only=False)
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
    what = f"the {role} split of {dataset.name}"
    if METRICS[dataset.metric].multi_label:
        rows, targets = np.arange(len(split)), np.zeros((len(split), count), bool)
        targets[np.repeat(rows, lengths), values] = True
    else:
        rows = np.flatnonzero(lengths)
        targets = values[np.cumsum(lengths)[rows] - lengths[rows]].astype(np.int32)
    if not len(values):
        raise UserError(f"No image of {what} has a class: set label_key of its source.")
    if role != VALIDATION:  # which may be a small part of the training split
        check_classes([np.unique(values).tolist()], dataset.class_names, what)
    return (split if len(rows) == len(split) else split.take(rows)), targets
