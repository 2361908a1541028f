"""Embeddings of a model in training: in memory, the same on every host."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath

from clip_jax.data.sources import reading
from clip_jax.data.sources.base import Example, Source
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.embed.encoder import Encoder, Variables
from clip_jax.errors import BadExample, UserError
from clip_jax.evaluate.embedding_source import Split
from clip_jax.evaluate.sets import finding
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


class Live:
    """`Material` for one evaluation of the variables bound last."""

    def __init__(
        self,
        encoder: Encoder,
        tokenizer: Tokenizer,
        data_dir: str,
        threads: int,
        fallback_dir: epath.Path | None,
    ):
        """Reads nothing yet.

        Args:
          encoder: over all devices of all hosts.
          tokenizer: of texts.
          data_dir: of the data sets.
          threads: that read; 0: one per CPU core.
          fallback_dir: directory for indices of shards whose own cannot be written to.
        """
        self.mesh, self.scale = encoder.mesh, 1.0
        self.embeds_texts, self.can_score_text = encoder.embeds_texts, encoder.can_score_text
        self._encoder, self._tokenizer, self._threads = encoder, tokenizer, threads
        self._data_dir, self._fallback_dir = data_dir, fallback_dir
        self._variables: Variables = {}
        self._sources: dict[tuple[str, str], Source] = {}
        self._tables: dict[tuple[str, str], pa.Table] = {}
        self._splits: dict[tuple[str, str], Split] = {}

    def bind(self, variables: Variables) -> None:
        """Forgets the embeddings by earlier variables."""
        self._variables = variables
        self._splits.clear()
        if "logit_scale" in variables["params"]:
            self.scale = float(np.exp(to_host(variables["params"]["logit_scale"])))

    def source(self, dataset: Dataset, role: str) -> Source:
        """The examples of a split; `finding.NotOnDisk` where they are not there."""
        key = dataset.name, role
        if key not in self._sources:
            side = self._encoder.image_size
            self._sources[key] = finding.open_split(
                dataset, role, self._data_dir, image_size=side, fallback_dir=self._fallback_dir
            )
        return self._sources[key]

    def split(self, dataset: Dataset, role: str) -> Split:
        """A split, embedded by all hosts together."""
        key = dataset.name, role
        if key not in self._splits:
            source = self.source(dataset, role)
            batches = list(self._encoder.images(self._variables, source, features=True))
            if not sum(len(batch["index"]) for batch in batches):
                raise UserError(f"No image of {dataset.title}, {role}, can be used.")
            index, embeds, features = (
                np.concatenate([batch[name] for batch in batches])
                for name in ("index", "embed", "features")
            )
            table = self._table(key, source)
            usable = pa.array(np.searchsorted(table["index"].to_numpy(), index))
            skipped = Counter({"unusable example": len(source) - len(index)})
            rows = np.arange(len(index))
            self._splits[key] = Split(table.take(usable), embeds, features, +skipped, rows)
        return self._splits[key]

    def release(self, dataset: Dataset) -> None:
        """Forgets the embeddings of a data set."""
        for key in [key for key in self._splits if key[0] == dataset.name]:
            del self._splits[key]

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, e], L2-normalised; texts longer than the context are cut."""
        return self._encoder.texts(self._variables, self._tokenizer(list(texts), truncate=True))

    def scores(
        self, dataset: Dataset, role: str, texts: Sequence[str], owners: np.ndarray, classes: int
    ) -> np.ndarray:
        """Scores of classes for all usable examples of a split; see `material.Material`."""
        prompts = prepare(self._tokenizer(list(texts), truncate=True))
        source = self.source(dataset, role)
        batches = self._encoder.scores(self._variables, source, prompts, owners, classes)
        return np.concatenate([batch["scores"] for batch in batches])

    def picture(self, dataset: Dataset, role: str, index: int) -> np.ndarray:
        """An example's image as the model sees it, uint8 [h, w, 3]."""
        return self._encoder.picture(self.source(dataset, role), index)

    def _table(self, key: tuple[str, str], source: Source) -> pa.Table:
        """What is known of each example; every host reads them all, once."""
        if key not in self._tables:
            found = reading.by_threads(_row, source, range(len(source)), self._threads)
            rows = [{"index": index, **row} for index, row in enumerate(found) if row]
            self._tables[key] = pa.Table.from_pylist(rows, schema=_SCHEMA)
        return self._tables[key]


def _row(read: Callable[[], Example]) -> dict[str, Any] | None:
    try:
        example = read()
    except BadExample:
        return None
    return {
        "key": example.key,
        "captions": list(example.captions.texts),
        "labels": list(example.labels),
        "groups": list(example.groups),
    }
