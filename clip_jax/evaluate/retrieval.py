"""Image-to-text and text-to-image retrieval: recall@1, 5, 10."""

import functools

import numpy as np

from clip_jax.data.sources.base import Source
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.embed.encoder import Encoder, Variables
from clip_jax.errors import UserError
from clip_jax.evaluate.measures.ranks import match_ranks
from clip_jax.evaluate.run_results import GalleryRow, RetrievalResult

CUTOFFS = (1, 5, 10)
_ROWS, _COLUMNS = 12, 5  # of the gallery


class Retrieval:
    """Finds the captions of each image and the images of each caption.

    An image may have several captions, and is right where any of them comes first. Captions that
    are the same text count as one, and all images that carry it as its matches.
    """

    def __init__(
        self, encoder: Encoder, source: Source, tokenizer: Tokenizer, max_examples: int | None
    ):
        """Reads nothing yet; `max_examples`: the first so many of the source, None: all."""
        self._encoder = encoder
        self._source = source
        self._tokenizer = tokenizer
        self._limit = max_examples

    @functools.cached_property
    def _captions(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all captions, int32 [n, s], and the index of each one's example, int32 [n]."""
        return self._encoder.captions(self._source, self._tokenizer, self._limit)

    def run(self, variables: Variables) -> RetrievalResult:
        """Embeds every image and every distinct caption once. UserError if nothing is usable."""
        tokens, owners = self._captions
        batches = list(self._encoder.images(variables, self._source, self._limit))
        usable = [np.isin(batch["index"], owners) for batch in batches]
        if not sum(map(np.sum, usable)):
            raise UserError("Retrieval evaluation found no usable image with a caption.")
        images, indices = (
            np.concatenate([batch[name][rows] for batch, rows in zip(batches, usable)])
            for name in ("embed", "index")
        )
        there = np.isin(owners, indices)
        tokens, text = _distinct(tokens[there])
        texts = self._encoder.texts(variables, tokens)
        pairs = _pairs(np.searchsorted(indices, owners[there]), text)
        to_text, to_image = match_ranks(images, texts, pairs, self._encoder.mesh)
        captions, carriers = (np.bincount(side) for side in pairs.T)
        return RetrievalResult(
            metrics=recalls("image_to_text", to_text) | recalls("text_to_image", to_image),
            chance=chance("image_to_text", captions, len(texts))
            | chance("text_to_image", carriers, len(images)),
            gallery=self._gallery(texts, images, pairs, tokens, indices),
        )

    def _gallery(self, texts, images, pairs, tokens, indices) -> list[GalleryRow]:
        rows = []
        for text in np.linspace(0, len(texts) - 1, min(_ROWS, len(texts)), dtype=int):
            nearest = np.argsort(-(images @ texts[text]), kind="stable")[:_COLUMNS]
            pictures = [self._encoder.picture(self._source, int(indices[i])) for i in nearest]
            right = pairs[pairs[:, 1] == text, 0]
            rows.append(
                GalleryRow(
                    query=self._tokenizer.decode(tokens[text]),
                    images=pictures,
                    hits=np.isin(nearest, right).tolist(),
                )
            )
        return rows


def _distinct(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows without repetition, in order of first appearance, and the place of each among them."""
    numbers: dict[bytes, int] = {}
    places = np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in tokens])
    return tokens[np.unique(places, return_index=True)[1]], places


def _pairs(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """(image, text), each once, ascending: int64 [p, 2]."""
    count = int(texts.max()) + 1
    keys = np.unique(images.astype(np.int64) * count + texts)
    return np.stack(np.divmod(keys, count), axis=1)


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
