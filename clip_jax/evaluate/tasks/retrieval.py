"""Retrieval between images and captions, with the captions as they are and behind a prompt."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from clip_jax.common.pages.page import thumbnail
from clip_jax.errors import UserError
from clip_jax.evaluate import retrieval
from clip_jax.evaluate.embedding_source import TEST, Material, Split
from clip_jax.evaluate.measures import intervals
from clip_jax.evaluate.measures.ranks import Ranks, match_ranks
from clip_jax.evaluate.results import Found, Score
from clip_jax.evaluate.sets.dataset import Dataset
from clip_jax.evaluate.tasks.context import Context, Task

PLAIN, PROMPTED = "captions", "captions behind a prompt"
_QUERIES, _NEAREST = 12, 5  # of the gallery


def distinct(split: Split) -> tuple[list[str], np.ndarray]:
    """Every caption once; and the pairs (image, caption) that belong together, int64 [p, 2]."""
    numbers: dict[str, int] = {}
    pairs = [
        (image, numbers.setdefault(text, len(numbers)))
        for image, texts in enumerate(split.captions)
        for text in dict.fromkeys(texts)
    ]
    return list(numbers), np.array(pairs, np.int64).reshape(-1, 2)


def run(context: Context, dataset: Dataset) -> Found:
    """Ranks all captions for each image and all images for each caption."""
    material, settings = context.material, context.settings
    split = material.split(dataset, TEST)
    texts, pairs = distinct(split)
    if not texts:
        raise UserError(f"No image of {dataset.title} has a caption: set text_key of its source.")
    variants = {PLAIN: "{}", PROMPTED: settings.retrieval_prompt}
    scores: list[Score] = []
    for variant, prompt in variants.items():
        embeds = material.texts([prompt.replace("{}", text) for text in texts])
        ranks = match_ranks(split.embeds, embeds, pairs, material.mesh)
        scores += _scores(dataset, variant, ranks, pairs, settings.confidence)
    plain = material.texts(texts)
    details: dict[str, Any] = {
        "images": len(split),
        "captions": len(texts),
        "prompt": settings.retrieval_prompt,
        "skipped": dict(split.skipped),
        "gallery": _gallery(material, dataset, split, texts, plain, pairs),
    }
    return Found(scores, details)


def _scores(
    dataset: Dataset, variant: str, ranks: Ranks, pairs: np.ndarray, confidence: float
) -> list[Score]:
    """Recalls in both directions; text to image first, as the one that people quote."""
    images, texts = len(ranks.image_to_text), len(ranks.text_to_image)
    found = []
    for direction, own, axis, candidates in (
        ("text_to_image", ranks.text_to_image, 1, images),
        ("image_to_text", ranks.image_to_text, 0, texts),
    ):
        matches = np.bincount(pairs[:, axis], minlength=len(own))
        guessed = retrieval.chance(direction, matches, candidates)
        for name, value in retrieval.recalls(direction, own).items():
            low, high = intervals.clopper_pearson(round(value * len(own)), len(own), confidence)
            score = Score("retrieval", dataset.name, variant, name, value, low, high, len(own))
            found.append(dataclasses.replace(score, chance=guessed[name]))
    return found


def _gallery(
    material: Material,
    dataset: Dataset,
    split: Split,
    texts: Sequence[str],
    embeds: np.ndarray,
    pairs: np.ndarray,
) -> list[dict[str, Any]]:
    """Some captions with the images nearest to them."""
    rows = []
    for number in np.linspace(0, len(texts) - 1, min(_QUERIES, len(texts)), dtype=int):
        own = set(pairs[pairs[:, 1] == number, 0].tolist())
        nearest = np.argsort(-(split.embeds @ embeds[number]), kind="stable")[:_NEAREST].tolist()
        pictures = [material.picture(dataset, TEST, int(split.indices[i])) for i in nearest]
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
    roles=(TEST,),
    takes="images with captions, and a model that embeds texts",
    applies=lambda context, dataset: dataset.kind == "retrieval" and context.material.embeds_texts,
    run=run,
)
