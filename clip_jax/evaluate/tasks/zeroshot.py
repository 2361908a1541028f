"""Zero-shot classification, and what context and an ensemble of prompts add (paper figure 4)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from clip_jax.common.pages.page import thumbnail
from clip_jax.evaluate import confusion
from clip_jax.evaluate.embedding_source import TEST, Material, Split, labelled
from clip_jax.evaluate.results import Found
from clip_jax.evaluate.sets.dataset import Dataset, PromptSet
from clip_jax.evaluate.tasks.context import Context, Task, measure, recognizes
from clip_jax.models.prompts import average_classes, class_prompts

ENSEMBLE, SINGLE, BARE = "ensemble", "one prompt", "bare names"
_SINGLE = "a photo of a {}."  # the paper's default prompt


def variants(prompts: PromptSet) -> Mapping[str, PromptSet]:
    """The ensemble of all templates first, then less and less context."""
    return {
        ENSEMBLE: prompts,
        SINGLE: prompts._replace(templates=(_SINGLE,)),
        BARE: prompts._replace(templates=("{}",)),
    }


def similarities(
    material: Material, dataset: Dataset, split: Split, prompts: PromptSet
) -> np.ndarray:
    """How well classes fit the images of a test split.

    Returns:
      float32 [n, classes]: cosines, or log-likelihoods where the model embeds no texts.
    """
    names = prompts.class_names
    texts, owners = class_prompts(names, prompts.templates)
    if not material.embeds_texts:
        return material.scores(dataset, TEST, texts, owners, len(names))[split.rows]
    classes = average_classes(material.texts(texts), owners, len(names))
    return split.embeds @ classes.T


def run(context: Context, dataset: Dataset) -> Found:
    """Classifies the test split by the prompts of its classes."""
    material, settings = context.material, context.settings
    split, targets = labelled(material, dataset, TEST)
    prompts = dataset.prompt_set(settings.prompts)
    scores, best = [], np.zeros((0, 0), np.float32)
    for variant, some in variants(prompts).items():
        similar = similarities(material, dataset, split, some)
        scores.append(measure("zeroshot", dataset, variant, similar, targets, settings))
        best = similar if variant == ENSEMBLE else best
    details: dict[str, Any] = {
        "prompts": prompts.name,
        "templates": list(prompts.templates),
        "skipped": dict(split.skipped),
    }
    if not dataset.multi_label:
        found = confusion.summarize(
            targets,
            *confusion.rank(material.scale * best),
            [names.split("|")[0] for names in prompts.class_names],
            prompts.templates,
            lambda row: thumbnail(material.picture(dataset, TEST, int(split.indices[row]))),
        )
        details["classes"] = confusion.to_json(found)
    return Found(scores, details)


TASK = Task(
    title="Zero-shot classification",
    roles=(TEST,),
    takes="classes with prompts, and a model that knows texts",
    applies=recognizes,
    run=run,
)
