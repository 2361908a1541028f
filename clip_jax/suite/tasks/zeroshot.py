"""Zero-shot classification, and what context and an ensemble of prompts add (paper figure 4)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clip_jax.datasets.dataset import Dataset
from clip_jax.evals import confusion, zeroshot
from clip_jax.suite.material import TEST, Material, labelled
from clip_jax.suite.results import Found
from clip_jax.suite.tasks.context import Context, Task, measure
from clip_jax.pages.page import thumbnail

ENSEMBLE, SINGLE, BARE = "ensemble", "one prompt", "bare names"
_SINGLE = "a photo of a {}."  # the paper's default prompt

Prompts = tuple[Sequence[str], Sequence[str]]  # class names and templates


def variants(dataset: Dataset, wanted: str) -> Mapping[str, Prompts]:
    """The ensemble first, then with less and less context. `wanted`: name of the set of prompts."""
    names, templates = dataset.prompt_set(wanted)
    return {
        ENSEMBLE: (names, templates),
        SINGLE: (names, (_SINGLE,)),
        BARE: (names, ("{}",)),
    }


def similarities(material: Material, embeds: np.ndarray, prompts: Prompts) -> np.ndarray:
    """Cosines of images [n, e] with classes, float32 [n, classes]."""
    names, templates = prompts
    texts, owners = zeroshot.class_prompts(names, templates)
    classes = zeroshot.average_classes(material.texts(texts), owners, len(names))
    return embeds @ classes.T


def run(context: Context, dataset: Dataset) -> Found:
    """Classifies the test split by the prompts of its classes."""
    material, settings = context.material, context.settings
    split, targets = labelled(material, dataset, TEST)
    sets = variants(dataset, settings.prompts)
    scores, best = [], np.zeros((0, 0), np.float32)
    for variant, prompts in sets.items():
        similar = similarities(material, split.embeds, prompts)
        scores.append(measure("zeroshot", dataset, variant, similar, targets, settings))
        best = similar if variant == ENSEMBLE else best
    details: dict[str, Any] = {
        "prompts": settings.prompts,
        "templates": list(sets[ENSEMBLE][1]),
        "skipped": dict(split.skipped),
    }
    if not dataset.multi_label:
        found = confusion.summarize(
            targets,
            *confusion.rank(material.scale * best),
            [names.split("|")[0] for names in sets[ENSEMBLE][0]],
            sets[ENSEMBLE][1],
            lambda row: thumbnail(material.picture(dataset, TEST, int(split.indices[row]))),
        )
        details["classes"] = confusion.to_json(found)
    return Found(scores, details)


TASK = Task(
    title="Zero-shot classification",
    roles=(TEST,),
    applies=lambda context, dataset: dataset.kind == "classification" and bool(dataset.prompts),
    run=run,
)
