"""Approximate search by a graph of neighbours (HNSW, usearch), kept beside the embeddings."""

import os

import numpy as np
import tqdm
from jaxtyping import Float

from clip_jax.embed.store import Store
from clip_jax.errors import UserError
from clip_jax.search.exact import Best
from clip_jax.storage import locations, ranges, writing

_CONNECTIVITY = 16  # links of a row
_EXPANSION_ADD, _EXPANSION_SEARCH = 128, 256  # candidates while adding and while searching


class Index:
    """An index of one column of a store, mapped from its file or a local copy of it."""

    def __init__(self, store: Store, column: str):
        """Opens the index; builds it where there is none.

        Raises:
          UserError: usearch is missing.
        """
        try:
            from usearch.index import Index as Graph
        except ImportError as error:
            raise UserError(
                f"An approximate index needs usearch ({error}): run `pip install usearch`, or "
                "search exactly, without --index."
            ) from error
        # The name holds a checksum: the index of other embeddings is not taken for this one.
        path = store.directory / f"{column}-{store.manifest.fingerprint[:12]}.usearch"
        self._graph = Graph(
            ndim=store.manifest.columns[column],
            metric="ip",
            dtype="f16",
            connectivity=_CONNECTIVITY,
            expansion_add=_EXPANSION_ADD,
            expansion_search=_EXPANSION_SEARCH,
        )
        if (stat := locations.stat(path)) is None:
            self._build(store, column)
            with writing.replacing(path) as temporary:
                self._graph.save(os.fspath(temporary))
            stat = locations.stat(path)
        assert stat is not None
        self._graph.view(os.fspath(ranges.local_copy(path, stat)))

    def search(self, queries: Float[np.ndarray, "queries embed"], k: int) -> Best:
        """Searches as `exact.search` does, and misses one of the best now and then."""
        scores = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int32)
        for number, query in enumerate(queries):
            found = self._graph.search(query, k)
            scores[number, : len(found)] = 1 - found.distances
            rows[number, : len(found)] = found.keys
        return Best(scores, rows)

    def _build(self, store: Store, column: str) -> None:
        first = 0
        with tqdm.tqdm(desc="indexing", total=sum(store.counts()), unit=" rows") as bar:
            for block in store.blocks(column):
                self._graph.add(np.arange(first, first + len(block)), block)
                first += len(block)
                bar.update(len(block))
