"""The inputs of tasks: embedded splits of data sets, and embedded texts."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from clip_jax.data.sources.base import Source
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.errors import UserError
from clip_jax.evaluate.measures.metrics import METRICS
from clip_jax.evaluate.sets.dataset import Dataset, check_classes

TRAIN, VALIDATION, TEST = "train", "validation", "test"


@dataclasses.dataclass(frozen=True)
class EmbeddedSplit:
    """The n usable examples of a split.

    Attributes:
      table: columns "index" (in the source), "labels" and, where the data set has them,
        "captions", "groups" and "key", as in `embed.reader.Row`.
      embeds: embeddings of the images, float32 [n, e], L2-normalised; e is 0 if no task needs
        them.
      features: pre-projection features, float32 [n, f]; f is 0 if no task needs them.
      skipped: number of unusable examples, by reason.
      rows: positions of these examples among all usable ones of the split, int64 [n].
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
        """Positions of the examples in the source, int64 [n]."""
        return self.table["index"].to_numpy()

    @property
    def captions(self) -> list[list[str]]:
        """All captions of each example."""
        return self.table["captions"].to_pylist()

    @property
    def groups(self) -> list[list[str]]:
        """The values of the data set's group keys, for each example."""
        return self.table["groups"].to_pylist()

    def take(self, rows: np.ndarray) -> "EmbeddedSplit":
        """Selects rows."""
        return EmbeddedSplit(
            self.table.take(pa.array(rows)),
            self.embeds[rows],
            self.features[rows],
            self.skipped,
            self.rows[rows],
        )


class Nearest(NamedTuple):
    """The training images nearest to n test images.

    Attributes:
      similarity: cosine of each test image with its nearest training image, float32 [n].
      rows: positions of those in the training data, int32 [n].
    """

    similarity: np.ndarray
    rows: np.ndarray


class TrainingData(Protocol):
    """The training images, for the analysis of overlap.

    Attributes:
      name: name of the data, for people.
      parameters: checksum of the detector of near-duplicates.
    """

    name: str
    parameters: str

    def nearest(self, dataset: Dataset, split: EmbeddedSplit) -> Nearest:
        """Finds the nearest training images of examples of a data set's test split."""
        ...

    def picture(self, row: int) -> tuple[str, np.ndarray]:
        """Returns key and image, uint8 [h, w, 3], of a training example."""
        ...


class EmbeddingSource(Protocol):
    """A model's embeddings of data sets. Every host gets the same whole arrays.

    Attributes:
      mesh: devices that tasks may compute on.
      tokenizer: tokenizer of prompts and captions.
      scale: multiplier of similarities, exp(logit_scale); 1 where the model has none.
      embeds_texts: whether the model has a text tower.
      can_score_text: whether it has a text tower, or scores texts for an image.
      detects_duplicates: whether it was trained to embed near-duplicates close together.
    """

    mesh: Mesh
    tokenizer: Tokenizer
    scale: float
    embeds_texts: bool
    can_score_text: bool
    detects_duplicates: bool

    def source(self, dataset: Dataset, split: str) -> Source:
        """Opens a split; `finding.NotOnDisk` where it is not there."""
        ...

    def embedded(self, dataset: Dataset, split: str) -> EmbeddedSplit:
        """Returns a split, embedded."""
        ...

    def release(self, dataset: Dataset) -> None:
        """Frees the memory that a data set takes."""
        ...

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts: float32 [n, e], L2-normalised; long ones are cut to the context."""
        ...

    def scores(
        self,
        dataset: Dataset,
        split: str,
        texts: Sequence[str],
        class_ids: np.ndarray,
        classes: int,
    ) -> np.ndarray:
        """Scores classes for all usable examples of a split, with a model that embeds no texts.

        Args:
          dataset, split: data set and split of the examples.
          texts: prompts of the classes.
          class_ids: class of each prompt, int [texts].
          classes: number of classes.

        Returns:
          float32 [n, classes].
        """
        ...

    def views(self, dataset: Dataset, split: str) -> np.ndarray:
        """Embeds two views of each usable image, the same at every call: float32 [n, 2, e].

        Raises:
          UserError: no image can be used.
        """
        ...

    def picture(self, dataset: Dataset, split: str, index: int) -> np.ndarray:
        """Returns the image of an example as the model sees it, uint8 [h, w, 3]."""
        ...


def labelled(
    embeddings: EmbeddingSource, dataset: Dataset, split: str
) -> tuple[EmbeddedSplit, np.ndarray]:
    """Returns the examples of a split that have a class, and their targets.

    Returns:
      The split without the others, and class ids, int32 [n]. For a metric of several labels, the
      whole split, and bool [n, classes].

    Raises:
      UserError: no example has a class, a label has no class name, or a class has no example,
        except in validation splits and partial data sets.
    """
    examples = embeddings.embedded(dataset, split)
    lists, count = examples.table["labels"].combine_chunks(), len(dataset.class_names)
    values = lists.flatten().to_numpy(zero_copy_only=False)
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
    what = f"the {split} split of {dataset.name}"
    if not len(values):
        raise UserError(f"No image of {what} has a class: set label_key of its source.")
    if values.max() >= count:
        raise UserError(
            f"There is a label {values.max()} in {what}, but only {count} class names are given: "
            "set its class_names (in a config eval.zeroshot.class_names)."
        )
    if METRICS[dataset.metric].multi_label:
        rows, targets = np.arange(len(examples)), np.zeros((len(examples), count), bool)
        targets[np.repeat(rows, lengths), values] = True
    else:
        rows = np.flatnonzero(lengths)
        targets = values[np.cumsum(lengths)[rows] - lengths[rows]].astype(np.int32)
    # A validation split may be a small part of the training split.
    if split != VALIDATION and not dataset.partial:
        check_classes([np.unique(values).tolist()], dataset.class_names, what)
    return (examples if len(rows) == len(examples) else examples.take(rows)), targets
