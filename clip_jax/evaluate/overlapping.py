"""The training data as the analysis of overlap needs them: the nearest one of each test image."""

import numpy as np

from clip_jax.data.sources.base import Source
from clip_jax.embed.store import BLOCK
from clip_jax.evaluate.embedding_source import TEST, Nearest, Split
from clip_jax.evaluate.on_disk import Stored
from clip_jax.evaluate.sets.dataset import Dataset
from clip_jax.search import exact


class Training:
    """Training images, embedded by a detector of near-duplicates; see `material.Training`."""

    def __init__(self, name: str, source: Source, detector: Stored):
        """Embeds what is not embedded yet.

        Args:
          name: of the data, for people.
          source: of the training images.
          detector: any model that embeds near-duplicates close together.
        """
        self.name, self.parameters = name, detector.parameters
        self._source, self._detector = source, detector
        self._store = detector.fill("training", {"data": name}, source, ("image_embed",))

    def nearest(self, dataset: Dataset, split: Split) -> Nearest:
        """Of a part of the test split of a data set."""
        seen = self._detector.split(dataset, TEST)
        embeds = seen.embeds[np.searchsorted(seen.indices, split.indices)]
        mesh = self._detector.mesh
        blocks = exact.put_blocks(self._store.blocks("image_embed"), BLOCK, mesh)
        best = exact.search(blocks, embeds, 1, mesh)
        return Nearest(best.scores[:, 0], best.rows[:, 0])

    def picture(self, row: int) -> tuple[str, np.ndarray]:
        """Key and image, uint8 [h, w, 3], of a training example."""
        (found,) = self._store.rows([row])
        return found.key, self._detector.pixels(self._source, found.index)
