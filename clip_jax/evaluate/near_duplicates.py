"""How often a detector of near-duplicates finds the other view of an image among those of all."""

from typing import Any

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from clip_jax import sharding
from clip_jax.data.sources.base import Source
from clip_jax.embed.encoder import Encoder, Variables
from clip_jax.errors import UserError
from clip_jax.evaluate.measures.ranks import match_ranks
from clip_jax.models import views


class NearDuplicates:
    """Two views of each image of a source, the same at every evaluation."""

    def __init__(
        self,
        net: nn.Module,
        encoder: Encoder,
        source: Source,
        config: ConfigDict,
        seed: int,
        max_examples: int | None,
    ):
        """Compiles nothing yet.

        Args:
          net: one of `clip_jax.models.MODULES`.
          encoder: of its images.
          source: of images that the training does not see.
          config: the fields of `data.views` in configs/default.py.
          seed: of the views.
          max_examples: the first so many of the source; None: all.
        """
        self._encoder, self._source, self._limit = encoder, source, max_examples
        key = jax.random.key(seed)

        def embed(variables, images, numbers):
            pairs = views.two_views(images, key, config, numbers)
            embeds: Any = net.apply(
                variables, pairs.reshape(-1, *images.shape[1:]), method="encode_image"
            )
            return embeds.reshape(len(images), 2, -1)

        self._embed = jax.jit(embed, out_shardings=sharding.replicated(encoder.mesh))

    def run(self, variables: Variables) -> float:
        """Share of the images whose one view lies nearest to the other: recall@1.

        Raises:
          UserError: no image can be used.
        """
        batches = self._encoder.each(
            lambda batch: {"embeds": self._embed(variables, batch["image"], batch["index"])},
            self._source,
            limit=self._limit,
        )
        parts = [batch["embeds"] for batch in batches]
        if not sum(map(len, parts)):
            raise UserError("The evaluation of near-duplicates found no usable image.")
        pairs = np.concatenate(parts)
        own = np.stack([np.arange(len(pairs))] * 2, axis=1)
        ranks = match_ranks(pairs[:, 0], pairs[:, 1], own, self._encoder.mesh).image_to_text
        return float(np.mean(ranks < 1))
