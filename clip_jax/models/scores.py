"""Classes by the prompts that a model finds likely: zero-shot for models that embed no texts.

A class has several prompts: every name in every template. Its score is the logarithm of their mean
likelihood: how likely the caption is if one of them was picked at random. The mean of the
logarithms would let a single odd name, of several that are right, decide against a class.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from clip_jax.models.prompts import Prompts


def class_scores(
    net: nn.Module,
    variables: Any,
    images: jax.Array,
    prompts: Prompts,
    owners: jax.Array,
    classes: int,
) -> jax.Array:
    """How well each class fits each image; to be jitted.

    Args:
      net: one of `clip_jax.models.MODULES` that has `score`, which takes a prompt at a time: memory
        is that of as many captions as there are images, and a few numbers for each pair.
      variables: of the model.
      images: uint8 [b, h, w, 3].
      prompts: p of them; see `prompts.prepare`.
      owners: int32 [p], the class of each prompt.
      classes: their number; each has a prompt.

    Returns:
      float32 [b, classes], logarithms of likelihoods.
    """
    scores = cast(jax.Array, net.apply(variables, images, prompts, method="score")).T
    best = jax.ops.segment_max(scores, owners, classes)
    odds = jax.ops.segment_sum(jnp.exp(scores - best[owners]), owners, classes)
    prompts_of = jax.ops.segment_sum(jnp.ones(len(owners)), owners, classes)
    return (best + jnp.log(odds / prompts_of[:, None])).T
