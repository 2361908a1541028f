"""Recall of a detector of near-duplicates, which finds the second view of an image among all."""

import numpy as np

from clip_jax.evaluate.embedding_source import TEST
from clip_jax.evaluate.measures import intervals
from clip_jax.evaluate.measures.ranks import match_ranks
from clip_jax.evaluate.results import Findings, Score
from clip_jax.evaluate.sets.dataset import Dataset
from clip_jax.evaluate.tasks.context import Context, Task


def run(context: Context, dataset: Dataset) -> Findings:
    """Computes recall@1: the fraction of first views whose nearest second view is the right one."""
    embeddings = context.embeddings
    views = embeddings.views(dataset, TEST)
    n = len(views)
    own = np.stack([np.arange(n)] * 2, axis=1)
    ranks = match_ranks(views[:, 0], views[:, 1], own, embeddings.mesh).image_to_text
    found = int(np.sum(ranks < 1))
    low, high = intervals.clopper_pearson(found, n, context.settings.confidence)
    name = "near_duplicates"
    score = Score(name, dataset.name, "second view", "recall@1", found / n, low, high, n, 1 / n)
    return Findings([score], {"images": n})


TASK = Task(
    title="Near-duplicates",
    splits=(),
    requires="a model trained for near_duplicates",
    supports=lambda context, dataset: context.embeddings.detects_duplicates,
    run=run,
)
