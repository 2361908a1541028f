"""Searches a store by text or by picture."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Float32

from clip_jax import sharding
from clip_jax.api import Model, Pictures
from clip_jax.data.sources.base import from_key
from clip_jax.embed import embedder, inputs
from clip_jax.embed.store import BLOCK, Row, Store
from clip_jax.errors import UserError
from clip_jax.search import exact


class Hit(NamedTuple):
    """A result of a search.

    Attributes:
      score: cosine with the query.
      row: row of the store.
      path: path of the image; "": it is no file of its own.
    """

    score: float
    row: Row
    path: str


class Searcher:
    """A model and its embeddings."""

    def __init__(self, model: Model, store: Store, column: str, approximate: bool):
        """Opens the index, or builds a missing one; reads no embeddings otherwise.

        Args:
          model: model of the embeddings.
          store: complete embeddings.
          column: one of its columns; "": the first.
          approximate: whether to search an index instead of all rows.

        Raises:
          UserError: the embeddings are another model's, or there is no such column.
        """
        manifest = store.manifest
        if embedder.fingerprint(model) != manifest.parameters:
            raise UserError(
                f"The embeddings in {store.directory} were made by another model: "
                f"{manifest.model} with the checksum {manifest.parameters[:12]}. Name that one by "
                "--model, or embed the data again by this one, into another directory."
            )
        self.column = column or next(iter(manifest.columns))
        if self.column not in manifest.columns:
            raise UserError(
                f"The embeddings in {store.directory} have no column {column}, but "
                f"{', '.join(manifest.columns)}: choose with --column."
            )
        self.model, self.store = model, store
        self._root = inputs.picture_root(manifest.data["data"], manifest.data["image_key"])
        self._mesh = sharding.make_mesh(devices=jax.local_devices())
        self._resident: list[exact.Block] | None = None
        self._index = None
        if approximate:
            from clip_jax.search.approximate import Index

            self._index = Index(store, self.column)

    def hold(self) -> None:
        """Keeps the embeddings on the devices for many searches; with an index it does nothing."""
        if self._index is None:
            self._resident = list(self._blocks())

    def texts(self, texts: str | Sequence[str], k: int) -> list[list[Hit]]:
        """Finds the k best rows of one or many texts, best first."""
        return self._search(self.model.encode_text(texts, truncate=True), k)

    def pictures(self, pictures: Pictures, k: int) -> list[list[Hit]]:
        """Finds the k best rows of each picture, best first."""
        return self._search(self.model.encode_image(pictures), k)

    def _blocks(self):
        return exact.put_blocks(self.store.blocks(self.column), BLOCK, self._mesh)

    def _search(self, queries: Float32[np.ndarray, "queries embed"], k: int) -> list[list[Hit]]:
        if self._index is not None:
            best = self._index.search(queries, k)
        else:
            best = exact.search(self._resident or self._blocks(), queries, k, self._mesh)
        found = [[int(row) for row in rows if row >= 0] for rows in best.rows]
        rows = iter(self.store.rows([row for rows in found for row in rows]))
        return [
            [self._hit(float(score), next(rows)) for score, _ in zip(scores, numbers)]
            for scores, numbers in zip(best.scores, found)
        ]

    def _hit(self, score: float, row: Row) -> Hit:
        path = str(epath.Path(self._root) / from_key(row.key)) if self._root else ""
        return Hit(score, row, path)
