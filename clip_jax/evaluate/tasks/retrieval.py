"""Retrieval between images and captions: recall@1, 5, 10, with and without a prompt."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from clip_jax.common.pages.pictures import thumbnail
from clip_jax.errors import UserError
from clip_jax.evaluate.embedding_source import TEST, EmbeddedSplit, EmbeddingSource
from clip_jax.evaluate.measures import intervals
from clip_jax.evaluate.measures.ranks import Ranks, match_ranks
from clip_jax.evaluate.results import Findings, Score
from clip_jax.evaluate.sets.dataset import Dataset
from clip_jax.evaluate.tasks.context import Context, Task

PLAIN, PROMPTED = "captions", "captions behind a prompt"
CUTOFFS = (1, 5, 10)
_QUERIES, _NEAREST = 12, 5  # captions in the gallery, images for each


class Captions(NamedTuple):
    """The captions of a split.

    Attributes:
      texts: the m distinct captions, in order of first appearance.
      pairs: matching (image, caption), each once, int64 [p, 2], ascending. An image is a position
        in `images`.
      images: rows of the split that have a caption, int64 [n].
    """

    texts: list[str]
    pairs: np.ndarray
    images: np.ndarray


def captions(embeddings: EmbeddingSource, split: EmbeddedSplit) -> Captions:
    """Collects the captions of a split.

    Captions with equal token ids count as one caption, which matches every image that has it.
    Images without a caption, or with only empty captions, are left out.
    """
    tokenizer, lists = embeddings.tokenizer, split.captions
    flat = [text for texts in lists for text in texts]
    ids, _ = tokenizer.encode_batch(flat)
    numbers: dict[bytes, int] = {}
    texts, pairs, images, at = [], set(), [], 0
    for row, own in enumerate(lists):
        rows, at = range(at, at + len(own)), at + len(own)
        full = [i for i in rows if not tokenizer.is_empty(ids[i])]
        for i in full:
            number = numbers.setdefault(ids[i].tobytes(), len(numbers))
            if number == len(texts):
                texts.append(flat[i])
            pairs.add((len(images), number))
        if full:
            images.append(row)
    ordered = np.array(sorted(pairs), np.int64).reshape(-1, 2)
    return Captions(texts, ordered, np.array(images, np.int64))


def run(context: Context, dataset: Dataset) -> Findings:
    """Ranks all captions for each image and all images for each caption."""
    embeddings, settings = context.embeddings, context.settings
    whole = embeddings.embedded(dataset, TEST)
    texts, pairs, images = captions(embeddings, whole)
    if not texts:
        raise UserError(
            f"No usable image of {dataset.title} has a caption: set text_key of its source."
        )
    split = whole.take(images)
    plain = embeddings.texts(texts)
    ranks = match_ranks(split.embeds, plain, pairs, embeddings.mesh)
    scores = _scores(dataset, PLAIN, ranks, pairs, settings.confidence)
    details: dict[str, Any] = {
        "images": len(split),
        "captions": len(texts),
        "prompt": "" if context.headline_only else settings.retrieval_prompt,
        "skipped": dict(whole.skipped),
        "gallery": _gallery(embeddings, dataset, split, texts, plain, pairs),
    }
    if not context.headline_only:
        prompted = embeddings.texts([details["prompt"].replace("{}", text) for text in texts])
        ranks = match_ranks(split.embeds, prompted, pairs, embeddings.mesh)
        scores += _scores(dataset, PROMPTED, ranks, pairs, settings.confidence)
    return Findings(scores, details)


def recalls(direction: str, ranks: np.ndarray) -> dict[str, float]:
    """Computes the fraction of queries with a match among the first k, for each cutoff."""
    return {f"{direction}/recall@{k}": float(np.mean(ranks < k)) for k in CUTOFFS}


def chance(direction: str, matches: np.ndarray, candidates: int) -> dict[str, float]:
    """Computes the recalls that a random order reaches.

    Args:
      direction: first part of the metrics' names.
      matches: number of matching candidates of each query, int [q].
      candidates: number of candidates.
    """
    missed, result = np.ones(len(matches)), {}
    for k in range(1, max(CUTOFFS) + 1):
        wrong_left = candidates - matches - (k - 1)
        missed = missed * np.clip(wrong_left / max(candidates - (k - 1), 1), 0, 1)
        if k in CUTOFFS:
            result[f"{direction}/recall@{k}"] = float(1 - missed.mean())
    return result


def _scores(
    dataset: Dataset, variant: str, ranks: Ranks, pairs: np.ndarray, confidence: float
) -> list[Score]:
    """Returns the recalls in both directions; text to image comes first, since it is quoted."""
    images, texts = len(ranks.image_to_text), len(ranks.text_to_image)
    found = []
    for direction, own, axis, candidates in (
        ("text_to_image", ranks.text_to_image, 1, images),
        ("image_to_text", ranks.image_to_text, 0, texts),
    ):
        matches = np.bincount(pairs[:, axis], minlength=len(own))
        guessed = chance(direction, matches, candidates)
        for name, value in recalls(direction, own).items():
            low, high = intervals.clopper_pearson(round(value * len(own)), len(own), confidence)
            found.append(
                Score(
                    task="retrieval",
                    dataset=dataset.name,
                    variant=variant,
                    metric=name,
                    value=value,
                    low=low,
                    high=high,
                    n=len(own),
                    chance=guessed[name],
                )
            )
    return found


def _gallery(
    embeddings: EmbeddingSource,
    dataset: Dataset,
    split: EmbeddedSplit,
    texts: Sequence[str],
    embeds: np.ndarray,
    pairs: np.ndarray,
) -> list[dict[str, Any]]:
    """Returns some captions with the images nearest to them."""
    rows = []
    for number in np.linspace(0, len(texts) - 1, min(_QUERIES, len(texts)), dtype=int):
        own = set(pairs[pairs[:, 1] == number, 0].tolist())
        nearest = np.argsort(-(split.embeds @ embeds[number]), kind="stable")[:_NEAREST].tolist()
        pictures = [embeddings.picture(dataset, TEST, int(split.indices[i])) for i in nearest]
        rows.append(
            {
                "query": texts[number],
                "images": [dataclasses.asdict(thumbnail(picture)) for picture in pictures],
                "hits": [i in own for i in nearest],
            }
        )
    return rows


TASK = Task(
    title="Retrieval",
    splits=(TEST,),
    requires="images with captions, and a model that embeds texts",
    supports=lambda context, dataset: (
        dataset.kind == "retrieval" and context.embeddings.embeds_texts
    ),
    run=run,
)
