"""Prediction of the words of a caption, in no order: the second baseline of the paper's figure 2.

A linear layer on the image tower and a softmax over the vocabulary; the target is the bag of the
caption's tokens, each of k different ones with probability 1 / k. So did Mahajan et al. (2018,
arXiv:1805.00932) with hashtags, after Joulin et al. (2016, arXiv:1511.02251), whose multi-class
logistic loss sums over the words of a caption in the same way; a sigmoid per word did worse there.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float32, Int

from clip_jax import sharding
from clip_jax.models.image_model import ImageModel, Images, Inputs, Outputs, RowIds
from clip_jax.models.prompts import Prompts
from clip_jax.models.text import own_tokens


class BagOfWords(ImageModel):
    """The image tower and a linear layer; pure `init` and `apply`."""

    def setup(self):
        super().setup()
        normal = nn.initializers.normal(self.size.embed_dim**-0.5)
        product = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
        self.head = nn.Dense(
            self.size.vocab_size, dtype=self.dtype, kernel_init=normal, dot_general=product
        )

    def outputs(self, batch: Inputs, train: bool = False) -> Outputs:
        """Computes the negative log-likelihood of the words of captions, given their images.

        Args:
          batch: images and captions.
          train: see `image_features`.

        Returns:
          "nats" [b], the mean over the distinct words of each caption, and "predicted" [b], ones,
          since each counts as one prediction.
        """
        tokens = jnp.asarray(batch["tokens"])
        words = self._words(batch["image"], train, batch.get("row"))
        logs = jnp.take_along_axis(words, tokens, axis=1)
        nats = -jnp.sum(bag(tokens) * logs, axis=1)
        return {"nats": nats, "predicted": jnp.ones_like(nats)}

    def score(self, images: Images, prompts: Prompts) -> Float32[Array, "batch prompts"]:
        """Computes the mean log-probability of the distinct words of each prompt, given each image.

        Args:
          images: see `image_features`.
          prompts: prompts of all classes.
        """
        words, tokens = self._words(images), jnp.asarray(prompts.tokens)
        return jax.lax.map(lambda one: words[:, one[0]] @ one[1], (tokens, bag(tokens))).T

    def _words(
        self, images: Images, train: bool = False, rows: RowIds | None = None
    ) -> Float32[Array, "batch vocabulary"]:
        """Computes log-probabilities over the vocabulary."""
        features = sharding.spread_batch(self.image_features(images, train, rows))
        return jax.nn.log_softmax(self.head(features))


def bag(tokens: Int[Array, "batch length"]) -> Float32[Array, "batch length"]:
    """Computes the weight of each token in the bag of its caption.

    Returns:
      1 / k where one of the k distinct words of a caption stands for the first time, else 0.
    """
    own = own_tokens(tokens)
    same = (tokens[:, :, None] == tokens[:, None, :]) & own[:, None, :]
    before = jnp.tri(tokens.shape[1], k=-1, dtype=bool)
    first = own & ~jnp.any(same & before, axis=2)
    return first / jnp.maximum(jnp.sum(first, axis=1, keepdims=True), 1)
