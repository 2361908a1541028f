"""Embeddings on disk, computed once for all tasks and resumed after a killed command."""

import contextlib
import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict, FrozenConfigDict

from clip_jax.api import Model
from clip_jax.data.sources.base import Example, Source
from clip_jax.data.sources.captions import Captions
from clip_jax.embed import embedder
from clip_jax.embed.store import BLOCK, Store
from clip_jax.errors import BadExample, UserError
from clip_jax.evaluate.embedding_source import TEST, EmbeddedSplit, Nearest
from clip_jax.evaluate.sets import finding
from clip_jax.evaluate.sets.dataset import Dataset
from clip_jax.models.prompts import prepare
from clip_jax.search import exact
from clip_jax.sharding import to_host
from clip_jax.storage import locations, ranges, writing

_ROWS = 16_384  # examples per part, the most that a killed evaluation loses
_SAMPLED = 32  # examples that data is recognised by
_POLL = 5.0  # seconds between checks for the parts of other hosts


class OnDiskEmbeddings:
    """An `EmbeddingSource` of one model, stored in one directory."""

    def __init__(
        self,
        model: Model,
        directory: epath.PathLike,
        data_dir: str,
        *,
        batch_size: int,
        threads: int,
        views: ConfigDict,
        process: int = 0,
        processes: int = 1,
    ):
        """Prepares the embeddings; reads nothing yet.

        Args:
          model: model with a tokenizer.
          directory: directory for the embeddings.
          data_dir: directory of the data sets.
          batch_size: images or texts per step, over the devices of a host.
          threads: threads that read and decode; 0: one per CPU core.
          views: strengths of the changes between two views; `data.views` in configs/default.py.
          process: number of this host.
          processes: number of hosts that share the work.
        """
        assert model.tokenizer is not None
        self.model, self.tokenizer = model, model.tokenizer
        self.parameters = embedder.fingerprint(model)
        self._embedder = embedder.Embedder(model, batch_size, threads)
        self._directory, self._data_dir = locations.parse(directory), data_dir
        self._hosts = process, processes
        self._views = FrozenConfigDict(views)
        self._sources: dict[tuple[str, str], Source] = {}
        self._held: dict[tuple[str, str], EmbeddedSplit] = {}
        self._samples: dict[tuple[str, str], str] = {}
        encoder, params = self._embedder.encoder, model.variables["params"]
        self.mesh = encoder.mesh
        self.embeds_texts, self.can_score_text = encoder.embeds_texts, encoder.can_score_text
        self.detects_duplicates = encoder.detects_duplicates
        self.scale = (
            float(np.exp(to_host(params["logit_scale"]))) if "logit_scale" in params else 1.0
        )

    def source(self, dataset: Dataset, split: str) -> Source:
        """Opens a split; `finding.NotOnDisk` where it is not there."""
        key = dataset.name, split
        if key not in self._sources:
            self._sources[key] = finding.open_split(
                dataset,
                split,
                self._data_dir,
                image_size=self.model.net.size.image_size,
                fallback_dir=self._directory / "index",
            )
        return self._sources[key]

    def embedded(self, dataset: Dataset, split: str) -> EmbeddedSplit:
        """Returns a split, embedded; waits for the parts that other hosts embed."""
        name = f"{dataset.name}-{split}"
        if (dataset.name, split) not in self._held:
            source = self.source(dataset, split)
            columns = ("image_embed", "image_features")
            data = {"dataset": dataset.name, "split": split, "sample": self.sample(dataset, split)}
            store = self.fill(name, data, source, columns)
            if not sum(store.counts()):
                raise UserError(f"No image of {dataset.title}, {split}, can be used.")
            table = store.table()
            self._held[dataset.name, split] = EmbeddedSplit(
                table=table,
                embeds=read(store, "image_embed"),
                features=read(store, "image_features"),
                skipped=Counter(bad["reason"] for bad in store.finish()),
                rows=np.arange(table.num_rows),
            )
        return self._held[dataset.name, split]

    def sample(self, dataset: Dataset, split: str) -> str:
        """Computes a checksum of a few examples of a split, to recognise the data by."""
        key = dataset.name, split
        if key not in self._samples:
            self._samples[key] = sample(self.source(dataset, split))
        return self._samples[key]

    def release(self, dataset: Dataset) -> None:
        """Frees the memory that a data set takes; its embeddings stay on disk."""
        for held in (self._sources, self._held):
            for key in [key for key in held if key[0] == dataset.name]:
                del held[key]

    def work_alone(self) -> None:
        """Lets this host embed everything that is still missing by itself."""
        self._hosts = 0, 1

    def fill(
        self, name: str, data: Mapping[str, str], source: Source, columns: Sequence[str]
    ) -> Store:
        """Completes a store of the embeddings of a source, and returns it.

        Args:
          name: name of the store's directory.
          data: description of the examples, to recognise them by.
          source: examples.
          columns: columns to compute, some of `store.COLUMNS`.

        Raises:
          UserError: the directory holds embeddings of something else.
        """
        store = embedder.begin_store(
            self._directory / name,
            data,
            len(source),
            self.model,
            columns,
            dtype="float32",
            format="npy",
            rows=_ROWS,
        )
        self._embedder.embed_missing(store, source, *self._hosts, label=name)
        while store.missing():
            time.sleep(_POLL)
        return store

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts: float32 [n, e], L2-normalised; stored on disk, long texts are cut."""
        digest = hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:24]
        path = self._directory / "texts" / f"{self.parameters[:12]}-{digest}.npy"
        with contextlib.suppress(FileNotFoundError):
            return np.load(io.BytesIO(ranges.read(path)))
        if len(texts) > _ROWS:  # many enough to be stored in parts, for resumption
            made = self.fill(f"texts/{digest}", {"texts": digest}, Texts(texts), ("text_embed",))
            embeds = np.zeros((len(texts), made.manifest.columns["text_embed"]), np.float32)
            embeds[made.table()["index"].to_numpy()] = read(made, "text_embed")
            return embeds
        tokens = self.tokenizer(list(texts), truncate=True)
        embeds = self._embedder.encoder.texts(self.model.variables, tokens, by_length=True)
        with writing.replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, embeds)
        return embeds

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
        batches = self._embedder.encoder.scores(
            self.model.variables, source, prompts, class_ids, classes
        )
        return np.concatenate([batch["scores"] for batch in batches])

    def views(self, dataset: Dataset, split: str) -> np.ndarray:
        """Embeds two views of each usable image: float32 [n, 2, e]; not stored on disk."""
        source, variables = self.source(dataset, split), self.model.variables
        found = self._embedder.encoder.views(variables, source, self._views, seed=0)
        batches = [batch["embed"] for batch in found if len(batch["index"])]
        if not batches:
            raise UserError(f"There is no usable image in {dataset.title}, {split}.")
        return np.concatenate(batches)

    def picture(self, dataset: Dataset, split: str, index: int) -> np.ndarray:
        """Returns the image of an example as the model sees it, uint8 [h, w, 3]."""
        return self.pixels(self.source(dataset, split), index)

    def pixels(self, source: Source, index: int) -> np.ndarray:
        """Returns the image of an example of any source, uint8 [h, w, 3]."""
        return self._embedder.encoder.picture(source, index)


class TrainingImages:
    """Training images, embedded by a detector of near-duplicates; a `TrainingData`."""

    def __init__(self, name: str, source: Source, detector: OnDiskEmbeddings):
        """Embeds the images that are not embedded yet.

        Args:
          name: name of the data, for people.
          source: training images.
          detector: embeddings by a model that puts near-duplicates close together.
        """
        self.name, self.parameters = name, detector.parameters
        self._source, self._detector = source, detector
        data = {"data": name, "sample": sample(source)}
        self._store = detector.fill("training", data, source, ("image_embed",))

    def nearest(self, dataset: Dataset, split: EmbeddedSplit) -> Nearest:
        """Finds the nearest training images of examples of a data set's test split."""
        seen = self._detector.embedded(dataset, TEST)
        embeds = seen.embeds[np.searchsorted(seen.indices, split.indices)]
        mesh = self._detector.mesh
        blocks = exact.put_blocks(self._store.blocks("image_embed"), BLOCK, mesh)
        best = exact.search(blocks, embeds, 1, mesh)
        return Nearest(best.scores[:, 0], best.rows[:, 0])

    def picture(self, row: int) -> tuple[str, np.ndarray]:
        """Returns key and image, uint8 [h, w, 3], of a training example."""
        (found,) = self._store.rows([row])
        return found.key, self._detector.pixels(self._source, found.index)


class Texts:
    """A source of texts, which are then embedded like images."""

    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def __init__(self, texts: Sequence[str]):
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Example:
        return Example(b"", Captions((self._texts[index],), (1.0,)), (), f"text {index}")


def sample(source: Source) -> str:
    """Computes a checksum of the number of examples and of `_SAMPLED` of them, hexadecimal.

    Other shards of the same length under the same name are other data.
    """
    digest = hashlib.sha256(str(len(source)).encode())
    for index in np.unique(np.linspace(0, len(source) - 1, _SAMPLED).astype(int)).tolist():
        try:
            example = source[index]
        except BadExample as error:
            digest.update(str(error).encode())
            continue
        image = example.image
        digest.update(image if isinstance(image, bytes) else image.tobytes())
        digest.update(repr((example.key, example.labels, example.captions.texts)).encode())
    return digest.hexdigest()[:24]


def read(store: Store, column: str) -> np.ndarray:
    """Reads all rows of a column, float32 [n, width]."""
    blocks: list[Any] = list(store.blocks(column))
    return np.concatenate(blocks) if blocks else np.zeros((0, store.manifest.columns[column]))
