"""Embeddings by a model in training, held in memory, the same on every host."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from ml_collections import ConfigDict, FrozenConfigDict

from clip_jax.data.sources import reading
from clip_jax.data.sources.base import Example, Source
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.embed.encoder import Encoder, Variables
from clip_jax.errors import BadExample, UserError
from clip_jax.evaluate.embedding_source import EmbeddedSplit
from clip_jax.evaluate.sets.dataset import Dataset
from clip_jax.models.prompts import prepare
from clip_jax.sharding import to_host

_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("key", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("labels", pa.list_(pa.int32())),
        ("groups", pa.list_(pa.string())),
    ]
)


class InMemoryEmbeddings:
    """An `EmbeddingSource` that uses the variables bound last."""

    def __init__(
        self,
        encoder: Encoder,
        tokenizer: Tokenizer,
        open_split: Callable[[Dataset, str], Source],
        *,
        threads: int,
        views: ConfigDict,
        seed: int,
    ):
        """Prepares the embeddings; reads nothing yet.

        Args:
          encoder: encoder over all devices of all hosts.
          tokenizer: tokenizer of texts.
          open_split: function that opens a split of a data set.
          threads: threads that read; 0: one per CPU core.
          views: strengths of the changes between two views; `data.views` in configs/default.py.
          seed: seed of the views.
        """
        self.mesh, self.tokenizer, self.scale = encoder.mesh, tokenizer, 1.0
        self.embeds_texts, self.can_score_text = encoder.embeds_texts, encoder.can_score_text
        self.detects_duplicates = encoder.detects_duplicates
        self._encoder, self._open, self._threads = encoder, open_split, threads
        self._views, self._seed = FrozenConfigDict(views), seed
        self._with_features: Collection[str] = ()
        self._variables: Variables = {}
        self._between: Callable[[], None] = lambda: None
        self._sources: dict[tuple[str, str], Source] = {}
        self._tables: dict[tuple[str, str], pa.Table] = {}
        self._splits: dict[tuple[str, str], EmbeddedSplit] = {}

    def bind(
        self,
        variables: Variables,
        with_features: Collection[str] = (),
        between: Callable[[], None] = lambda: None,
    ) -> None:
        """Sets the variables, and drops the embeddings by earlier ones.

        Args:
          variables: variables to embed with from now on.
          with_features: names of the data sets whose pre-projection features are wanted too.
          between: called after each batch of images.
        """
        self._variables, self._with_features = variables, with_features
        self._between = between
        self._splits.clear()
        if "logit_scale" in variables["params"]:
            self.scale = float(np.exp(to_host(variables["params"]["logit_scale"])))

    def source(self, dataset: Dataset, split: str) -> Source:
        """Opens a split; `finding.NotOnDisk` where it is not there."""
        key = dataset.name, split
        if key not in self._sources:
            self._sources[key] = self._open(dataset, split)
        return self._sources[key]

    def embedded(self, dataset: Dataset, split: str) -> EmbeddedSplit:
        """Returns a split, embedded by all hosts together."""
        key = dataset.name, split
        if key not in self._splits:
            self._splits[key] = self._embed(dataset, split)
        return self._splits[key]

    def _embed(self, dataset: Dataset, split: str) -> EmbeddedSplit:
        source, table = self.source(dataset, split), self._tables.get((dataset.name, split))
        columns: dict[str, np.ndarray] = {}
        features = dataset.name in self._with_features
        if self.embeds_texts or features or table is None:
            if self.embeds_texts or features:
                found = self._encoder.images(self._variables, source, features=features)
            else:  # no task needs embeddings, only the usable examples and their labels
                found = self._encoder.each(lambda batch: {}, source)
            batches = [batch for batch in self._each(found) if len(batch["index"])]
            if not batches:
                raise UserError(f"There is no usable image in {dataset.title}, {split}.")
            columns = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
            table = self._table(dataset, split, columns["index"], columns["label"])
        nothing = np.zeros((len(table), 0), np.float32)
        return EmbeddedSplit(
            table,
            columns.get("embed", nothing),
            columns.get("features", nothing),
            +Counter({"unusable example": len(source) - len(table)}),
            np.arange(len(table)),
        )

    def _each(self, batches: Iterable[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
        for batch in batches:
            yield batch
            self._between()

    def release(self, dataset: Dataset) -> None:
        """Drops the embeddings of a data set."""
        for key in [key for key in self._splits if key[0] == dataset.name]:
            del self._splits[key]

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts: float32 [n, e], L2-normalised; long ones are cut to the context."""
        return self._encoder.texts(self._variables, self.tokenizer(list(texts), truncate=True))

    def scores(
        self,
        dataset: Dataset,
        split: str,
        texts: Sequence[str],
        class_ids: np.ndarray,
        classes: int,
    ) -> np.ndarray:
        """Scores classes for all usable examples of a split; see `EmbeddingSource`."""
        prompts = prepare(self.tokenizer(list(texts), truncate=True))
        source = self.source(dataset, split)
        batches = self._encoder.scores(self._variables, source, prompts, class_ids, classes)
        return np.concatenate([batch["scores"] for batch in self._each(batches)])

    def views(self, dataset: Dataset, split: str) -> np.ndarray:
        """Embeds two views of each usable image, the same at every call: float32 [n, 2, e]."""
        source = self.source(dataset, split)
        found = self._encoder.views(self._variables, source, self._views, self._seed)
        batches = [batch["embed"] for batch in self._each(found) if len(batch["index"])]
        if not batches:
            raise UserError(f"There is no usable image in {dataset.title}, {split}.")
        return np.concatenate(batches)

    def picture(self, dataset: Dataset, split: str, index: int) -> np.ndarray:
        """Returns the image of an example as the model sees it, uint8 [h, w, 3]."""
        return self._encoder.picture(self.source(dataset, split), index)

    def _table(
        self, dataset: Dataset, split: str, index: np.ndarray, label: np.ndarray
    ) -> pa.Table:
        """Returns the table of the usable examples, made once per run.

        Batches carry index and first label. If a data set needs more, every host reads the whole
        split by itself.
        """
        key = dataset.name, split
        held = self._tables.get(key)
        if held is None or not np.array_equal(held["index"].to_numpy(), index):
            labels_suffice = not (dataset.multi_label or dataset.group_keys)
            if dataset.kind == "classification" and labels_suffice:
                held = _of_labels(index, label)
            else:
                source = self.source(dataset, split)
                found = reading.by_threads(_row, source, range(len(source)), self._threads)
                rows = [{"index": number, **row} for number, row in enumerate(found) if row]
                whole = pa.Table.from_pylist(rows, schema=_SCHEMA)
                there = whole["index"].to_numpy()
                places = np.minimum(np.searchsorted(there, index), len(there) - 1)
                if not np.array_equal(there[places], index):
                    raise UserError(
                        f"Some examples of {dataset.title}, {split}, could be read at first and "
                        "not again: see to their storage."
                    )
                held = whole.take(pa.array(places))
            self._tables[key] = held
        return held


def _of_labels(index: np.ndarray, label: np.ndarray) -> pa.Table:
    """Returns the columns "index" and "labels"; a label of -1 becomes an empty list."""
    ends = np.concatenate([[0], np.cumsum(label >= 0)]).astype(np.int32)
    labels = pa.ListArray.from_arrays(pa.array(ends), pa.array(label[label >= 0], pa.int32()))
    return pa.table({"index": pa.array(index, pa.int64()), "labels": labels})


def _row(read: Callable[[], Example]) -> dict[str, Any] | None:
    try:
        example = read()
    except BadExample:
        return None
    return {
        "key": example.key,
        "captions": list(example.captions.texts),
        "labels": list(example.labels),
        "groups": list(map(str, example.groups)),
    }
