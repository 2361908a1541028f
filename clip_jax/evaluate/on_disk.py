"""Embeddings kept on disk: made once, shared by all tasks, resumed where a killed run ended."""

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

from clip_jax.api import Model
from clip_jax.data.sources.base import Example, Source
from clip_jax.data.sources.captions import Captions
from clip_jax.embed import embedder
from clip_jax.embed.store import Store
from clip_jax.errors import UserError
from clip_jax.evaluate.embedding_source import Split
from clip_jax.evaluate.sets import finding
from clip_jax.evaluate.sets.dataset import Dataset
from clip_jax.models.prompts import prepare
from clip_jax.sharding import to_host
from clip_jax.storage import locations, ranges, writing

_ROWS = 16_384  # examples in a part: what a killed evaluation loses at most
_POLL = 5.0  # seconds between looks at what other hosts have made


class Stored:
    """`Material` of one model, under one directory."""

    def __init__(
        self,
        model: Model,
        directory: epath.PathLike,
        data_dir: str,
        *,
        batch_size: int,
        threads: int,
        process: int = 0,
        processes: int = 1,
    ):
        """Reads nothing yet.

        Args:
          model: with a tokenizer.
          directory: for the embeddings.
          data_dir: of the data sets.
          batch_size: images or texts per step, over the devices of a host.
          threads: that read and decode; 0: one per CPU core.
          process: which host this is.
          processes: how many share the work.
        """
        self.model, self.parameters = model, embedder.fingerprint(model)
        self._embedder = embedder.Embedder(model, batch_size, threads)
        self._directory, self._data_dir = locations.parse(directory), data_dir
        self._share = process, processes
        self._sources: dict[tuple[str, str], Source] = {}
        self._held: dict[tuple[str, str], Split] = {}
        encoder, params = self._embedder.encoder, model.variables["params"]
        self.mesh = encoder.mesh
        self.embeds_texts, self.can_score_text = encoder.embeds_texts, encoder.can_score_text
        self.scale = (
            float(np.exp(to_host(params["logit_scale"]))) if "logit_scale" in params else 1.0
        )

    def source(self, dataset: Dataset, role: str) -> Source:
        """The examples of a split; `finding.NotOnDisk` where they are not there."""
        key = dataset.name, role
        if key not in self._sources:
            self._sources[key] = finding.open_split(
                dataset,
                role,
                self._data_dir,
                image_size=self.model.net.size.image_size,
                fallback_dir=self._directory / "index",
            )
        return self._sources[key]

    def split(self, dataset: Dataset, role: str) -> Split:
        """A split, embedded; waits for what other hosts make of it."""
        name = f"{dataset.name}-{role}"
        if (dataset.name, role) not in self._held:
            source = self.source(dataset, role)
            columns = ("image_embed", "image_features")
            store = self.fill(name, {"dataset": dataset.name, "split": role}, source, columns)
            if not sum(store.counts()):
                raise UserError(f"No image of {dataset.title}, {role}, can be used.")
            table = store.table()
            self._held[dataset.name, role] = Split(
                table=table,
                embeds=read(store, "image_embed"),
                features=read(store, "image_features"),
                skipped=Counter(bad["reason"] for bad in store.finish()),
                rows=np.arange(table.num_rows),
            )
        return self._held[dataset.name, role]

    def release(self, dataset: Dataset) -> None:
        """Forgets what is held in memory of a data set; it stays on disk."""
        for held in (self._sources, self._held):
            for key in [key for key in held if key[0] == dataset.name]:
                del held[key]

    def alone(self) -> None:
        """From here on, this host makes what is missing by itself."""
        self._share = 0, 1

    def fill(
        self, name: str, data: Mapping[str, str], source: Source, columns: Sequence[str]
    ) -> Store:
        """A complete store of these examples.

        Args:
          name: of its directory.
          data: names the examples.
          source: of them.
          columns: of `store.COLUMNS`.

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
        self._embedder.embed_missing(store, source, *self._share, label=name)
        while store.missing():
            time.sleep(_POLL)
        return store

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, e], L2-normalised; kept on disk, texts longer than the context are cut."""
        digest = hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:24]
        path = self._directory / "texts" / f"{self.parameters[:12]}-{digest}.npy"
        with contextlib.suppress(FileNotFoundError):
            return np.load(io.BytesIO(ranges.read(path)))
        if len(texts) > _ROWS:  # so many are worth being kept in parts
            made = self.fill(f"texts/{digest}", {"texts": digest}, Texts(texts), ("text_embed",))
            embeds = np.zeros((len(texts), made.manifest.columns["text_embed"]), np.float32)
            embeds[made.table()["index"].to_numpy()] = read(made, "text_embed")
            return embeds
        assert self.model.tokenizer is not None
        tokens = self.model.tokenizer(list(texts), truncate=True)
        embeds = self._embedder.encoder.texts(self.model.variables, tokens, by_length=True)
        with writing.replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, embeds)
        return embeds

    def scores(
        self, dataset: Dataset, role: str, texts: Sequence[str], owners: np.ndarray, classes: int
    ) -> np.ndarray:
        """Scores of classes for all usable examples of a split; see `material.Material`."""
        assert self.model.tokenizer is not None
        prompts = prepare(self.model.tokenizer(list(texts), truncate=True))
        source = self.source(dataset, role)
        batches = self._embedder.encoder.scores(
            self.model.variables, source, prompts, owners, classes
        )
        return np.concatenate([batch["scores"] for batch in batches])

    def picture(self, dataset: Dataset, role: str, index: int) -> np.ndarray:
        """An example's image as the model sees it, uint8 [h, w, 3]."""
        return self.pixels(self.source(dataset, role), index)

    def pixels(self, source: Source, index: int) -> np.ndarray:
        """The same of any source."""
        return self._embedder.encoder.picture(source, index)


class Texts:
    """Texts as a source, so that they are embedded like everything else."""

    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def __init__(self, texts: Sequence[str]):
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Example:
        return Example(b"", Captions((self._texts[index],), (1.0,)), (), f"text {index}")


def read(store: Store, column: str) -> np.ndarray:
    """All rows of a column, [n, width]."""
    blocks: list[Any] = list(store.blocks(column))
    return np.concatenate(blocks) if blocks else np.zeros((0, store.manifest.columns[column]))
