"""Zero-shot classification, with and without context and an ensemble (paper figure 4)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from clip_jax.common.pages.pictures import thumbnail
from clip_jax.evaluate import confusion
from clip_jax.evaluate.embedding_source import TEST, EmbeddedSplit, EmbeddingSource, labelled
from clip_jax.evaluate.measures import intervals, metrics
from clip_jax.evaluate.results import Findings, Score
from clip_jax.evaluate.sets.dataset import Dataset, PromptSet
from clip_jax.evaluate.tasks.context import Context, Settings, Task, measure, recognizes
from clip_jax.models.prompts import average_classes, class_prompts

ENSEMBLE, SINGLE, BARE = "ensemble", "one prompt", "bare names"
_SINGLE = "a photo of a {}."  # the paper's default prompt


def variants(prompts: PromptSet) -> Mapping[str, PromptSet]:
    """Returns the ensemble of all templates first, then variants with less context."""
    return {
        ENSEMBLE: prompts,
        SINGLE: prompts._replace(templates=(_SINGLE,)),
        BARE: prompts._replace(templates=("{}",)),
    }


def similarities(
    embeddings: EmbeddingSource, dataset: Dataset, split: EmbeddedSplit, prompts: PromptSet
) -> np.ndarray:
    """Computes the similarity of each image of a test split to each class.

    Returns:
      float32 [n, classes]: cosines, or log-likelihoods where the model embeds no texts.
    """
    names = prompts.class_names
    texts, class_ids = class_prompts(names, prompts.templates)
    if not embeddings.embeds_texts:
        return embeddings.scores(dataset, TEST, texts, class_ids, len(names))[split.rows]
    classes = average_classes(embeddings.texts(texts), class_ids, len(names))
    return split.embeds @ classes.T


def run(context: Context, dataset: Dataset) -> Findings:
    """Classifies the test split by the prompts of its classes."""
    embeddings, settings = context.embeddings, context.settings
    split, targets = labelled(embeddings, dataset, TEST)
    prompts = dataset.prompt_set(settings.prompts)
    tried = {ENSEMBLE: prompts} if context.headline_only else variants(prompts)
    scores, best = [], np.zeros((0, 0), np.float32)
    for variant, some in tried.items():
        similar = similarities(embeddings, dataset, split, some)
        scores.append(measure("zeroshot", dataset, variant, similar, targets, settings))
        best = similar if variant == ENSEMBLE else best
    details: dict[str, Any] = {
        "prompts": prompts.name,
        "templates": list(prompts.templates),
        "by_likelihood": not embeddings.embeds_texts,
        "skipped": dict(split.skipped),
    }
    if not dataset.multi_label:
        if len(prompts.class_names) > confusion.BEST:
            scores.append(_top5(dataset, best, targets, settings))
        found = confusion.summarize(
            targets,
            *confusion.rank(embeddings.scale * best),
            [names.split("|")[0] for names in prompts.class_names],
            lambda row: thumbnail(embeddings.picture(dataset, TEST, int(split.indices[row]))),
        )
        details["classes"] = confusion.to_json(found)
    return Findings(scores, details)


def _top5(dataset: Dataset, similar: np.ndarray, targets: np.ndarray, settings: Settings) -> Score:
    """Computes the fraction of images whose class is among the five best."""
    right, n = int(metrics.correct(similar, targets, k=5).sum()), len(targets)
    low, high = intervals.clopper_pearson(right, n, settings.confidence)
    guessed = 5 / similar.shape[1]
    return Score("zeroshot", dataset.name, ENSEMBLE, "top5", right / n, low, high, n, guessed)


TASK = Task(
    title="Zero-shot classification",
    splits=(TEST,),
    requires="classes with prompts, and a model that can score text",
    supports=recognizes,
    run=run,
)
