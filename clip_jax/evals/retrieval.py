"""Image-to-text and text-to-image retrieval: recall@1, 5, 10."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.data.sources import Source
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.errors import UserError
from clip_jax.evals.encoder import Encoder, Variables, put_rows, to_host
from clip_jax.evals.results import GalleryRow, RetrievalResult

CUTOFFS = (1, 5, 10)
_ROWS, _COLUMNS = 12, 5  # of the gallery
_CHUNK = 1024  # queries per step, so that the whole similarity matrix is never held


class Retrieval:
    """Finds the caption of each image and the images of each caption.

    Captions that are the same text count as one, and all images that carry it as its matches.
    """

    def __init__(
        self, encoder: Encoder, source: Source, tokenizer: Tokenizer, max_examples: int | None
    ):
        """Reads nothing yet; `max_examples`: the first so many of the source, None: all."""
        self._encoder = encoder
        self._source = source
        self._tokenizer = tokenizer
        self._limit = max_examples

    def run(self, variables: Variables) -> RetrievalResult:
        """Embeds every image and every distinct caption once. UserError if nothing is usable."""
        batches = list(self._encoder.images(variables, self._source, self._tokenizer, self._limit))
        if not sum(len(batch["index"]) for batch in batches):
            raise UserError("Retrieval evaluation found no usable image with a caption.")
        images, tokens, indices = (
            np.concatenate([batch[name] for batch in batches])
            for name in ("embed", "tokens", "index")
        )
        # Captions of the same ids are the same text.
        tokens, image_group = np.unique(tokens, axis=0, return_inverse=True)
        image_group = image_group.reshape(-1).astype(np.int32)
        texts = self._encoder.texts(variables, tokens)
        text_group = np.arange(len(texts), dtype=np.int32)
        mesh = self._encoder.mesh
        to_text = match_ranks(images, image_group, texts, text_group, mesh)
        to_image = match_ranks(texts, text_group, images, image_group, mesh)
        matches = np.bincount(image_group)
        return RetrievalResult(
            metrics=recalls("image_to_text", to_text) | recalls("text_to_image", to_image),
            chance=chance("image_to_text", np.ones(1), len(texts))
            | chance("text_to_image", matches, len(images)),
            gallery=self._gallery(texts, images, image_group, tokens, indices),
        )

    def _gallery(self, texts, images, image_group, tokens, indices) -> list[GalleryRow]:
        rows = []
        for text in np.linspace(0, len(texts) - 1, min(_ROWS, len(texts)), dtype=int):
            nearest = np.argsort(-(images @ texts[text]), kind="stable")[:_COLUMNS]
            pictures = [self._encoder.picture(self._source, int(indices[i])) for i in nearest]
            rows.append(
                GalleryRow(
                    query=self._tokenizer.decode(tokens[text]),
                    images=pictures,
                    hits=[bool(image_group[i] == text) for i in nearest],
                )
            )
        return rows


def match_ranks(
    queries: np.ndarray,
    query_group: np.ndarray,
    candidates: np.ndarray,
    candidate_group: np.ndarray,
    mesh: Mesh,
) -> np.ndarray:
    """How many wrong candidates come before the best right one, for each query.

    Args:
      queries: float32 [q, e]; query_group: int32 [q].
      candidates: float32 [c, e]; candidate_group: int32 [c]; right where the groups agree.
      mesh: devices that share the queries.

    Returns:
      int32 [q], 0: a right one is first. Ties and NaN count against the model.
    """
    chunk = -(-_CHUNK // mesh.size) * mesh.size
    rank = jax.jit(_ranks, out_shardings=sharding.replicated(mesh))
    ranks = []
    for start in range(0, len(queries), chunk):
        part = slice(start, start + chunk)
        rows = [put_rows(rows[part], chunk, mesh) for rows in (queries, query_group)]
        ranks.append(to_host(rank(*rows, candidates, candidate_group)))
    return np.concatenate(ranks)[: len(queries)]


def _ranks(queries, query_group, candidates, candidate_group):
    scores = jnp.matmul(queries, candidates.T, precision=jax.lax.Precision.HIGHEST)
    right = query_group[:, None] == candidate_group[None]
    best = jnp.max(jnp.where(right, scores, -jnp.inf), axis=1, keepdims=True)
    return jnp.sum(~right & ~(scores < best), axis=1)


def recalls(direction: str, ranks: np.ndarray) -> dict[str, float]:
    """Share of queries with a match among the first k, for each cutoff."""
    return {f"{direction}/recall@{k}": float(np.mean(ranks < k)) for k in CUTOFFS}


def chance(direction: str, matches: np.ndarray, candidates: int) -> dict[str, float]:
    """What a random order reaches.

    Args:
      direction: names the metrics.
      matches: right candidates of each query, int [q].
      candidates: their number.
    """
    missed, result = np.ones(len(matches)), {}
    for k in range(1, max(CUTOFFS) + 1):
        wrong_left = candidates - matches - (k - 1)
        missed = missed * np.clip(wrong_left / max(candidates - (k - 1), 1), 0, 1)
        if k in CUTOFFS:
            result[f"{direction}/recall@{k}"] = float(1 - missed.mean())
    return result
