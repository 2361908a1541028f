"""Embeds the missing parts of stores, each host its own."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from etils import epath
from jaxtyping import Float32

from clip_jax import sharding
from clip_jax.api import Model
from clip_jax.data.sources.base import Source
from clip_jax.embed.encoder import Encoder
from clip_jax.embed.reader import Reader
from clip_jax.embed.store import Manifest, Store
from clip_jax.sharding import path_name


def fingerprint(model: Model) -> str:
    """Computes a checksum of a model's parameters and tokenizer, hexadecimal."""
    digest = hashlib.sha256(model.tokenizer.identity.encode() if model.tokenizer else b"")
    for path, leaf in jax.tree.leaves_with_path(model.variables):
        digest.update(path_name(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def begin_store(
    directory: epath.Path,
    data: Mapping[str, str],
    examples: int,
    model: Model,
    columns: Sequence[str],
    *,
    dtype: str,
    format: str,
    rows: int,
) -> Store:
    """Creates a store with its manifest, or resumes the same one with its finished parts.

    Args:
      directory: directory of the store.
      data: description of the examples, for people and to tell stores apart.
      examples: number of examples.
      model: the model.
      columns: some of `store.COLUMNS`.
      dtype, format: one of `store.DTYPES` and one of `store.FORMATS`.
      rows: examples in a part.

    Raises:
      UserError: the directory has embeddings of other data, or by another model.
    """
    size = model.net.size
    widths = dict.fromkeys(columns, size.embed_dim)
    if "image_features" in widths:
        widths["image_features"] = size.feature_width
    manifest = Manifest(
        data=data,
        examples=examples,
        columns=widths,
        dtype=dtype,
        format=format,
        part_rows=rows,
        model=str(size),
        parameters=fingerprint(model),
    )
    store = Store(directory, manifest)
    store.begin()
    return store


class Embedder:
    """A model on all devices of this host.

    Attributes:
      encoder: its towers.
    """

    def __init__(self, model: Model, batch_size: int, threads: int):
        """Moves the model to the devices.

        Args:
          model: the model.
          batch_size: images or captions per step, over the devices.
          threads: threads that read and decode; 0: one per CPU core.
        """
        mesh = sharding.make_mesh(devices=jax.local_devices())
        model.variables = jax.device_put(model.variables, sharding.replicated(mesh))
        self.encoder = Encoder(model.net, mesh, batch_size, threads)
        self._model, self._threads = model, threads

    def embed_missing(
        self,
        store: Store,
        source: Source,
        process: int = 0,
        processes: int = 1,
        label: str = "embedding",
    ) -> int:
        """Embeds the missing parts of this host.

        Args:
          store: a store with its manifest.
          source: the examples.
          process: number of this host.
          processes: number of hosts.
          label: label of the progress bar.

        Returns:
          The number of parts made.
        """
        todo = [part for part in store.missing() if part % processes == process]
        total = sum(stop - first for first, stop in map(store.range, todo))
        if not todo:
            return 0
        with tqdm.tqdm(desc=label, total=total, unit=" examples", mininterval=0.5) as bar:
            for part in todo:
                self._embed_part(part, store, source, bar)
        return len(todo)

    def _embed_part(self, part: int, store: Store, source: Source, bar: Any) -> None:
        columns, model = store.manifest.columns, self._model
        reader = Reader(
            source,
            *store.range(part),
            size=model.net.size if "image_embed" in columns else None,
            tokenizer=model.tokenizer if "text_embed" in columns else None,
        )
        embeds: dict[str, np.ndarray] = {}
        if "image_embed" in columns:
            embeds |= self._images(reader, "image_features" in columns, bar)
        else:
            for _ in reader.read_all(self._threads):
                bar.update()
        if "text_embed" in columns:
            embeds["text_embed"] = self._texts([row.caption for row in reader.rows])
        store.write(part, reader.rows, embeds, reader.skipped)

    def _images(
        self, reader: Reader, features: bool, bar: Any
    ) -> dict[str, Float32[np.ndarray, "usable _"]]:
        """Embeds the images of the usable examples, by column."""
        size = self._model.net.size
        found = {"image_embed": np.zeros((len(reader), size.embed_dim), np.float32)}
        if features:
            found["image_features"] = np.zeros((len(reader), size.feature_width), np.float32)
        batches = self.encoder.images(self._model.variables, reader, features=features)
        for batch in batches:
            for name, values in found.items():
                values[batch["index"]] = batch[name.removeprefix("image_")]
            bar.update(len(batch["index"]))
        return {name: values[reader.indices] for name, values in found.items()}

    def _texts(self, captions: list[str]) -> Float32[np.ndarray, "texts embed"]:
        assert self._model.tokenizer is not None
        tokens = self._model.tokenizer(captions, truncate=True)
        return self.encoder.texts(self._model.variables, tokens, by_length=True)
