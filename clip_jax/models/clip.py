"""CLIP: an image tower and a text tower that meet in one embedding space."""

import math

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float32, Int

from clip_jax import sharding
from clip_jax.models.image_model import (
    Embeds,
    ImageModel,
    Images,
    Inputs,
    Outputs,
    RowIds,
    TokenIds,
    as_batch,
    l2_normalize,
)
from clip_jax.models.packing import Packing
from clip_jax.models.text import TextTransformer

PAIRS = ("image", "text", "logit_scale", "logit_bias")  # outputs that a contrastive loss takes


class CLIP(ImageModel):
    """Both towers and the temperature; pure `init` and `apply`.

    Variables are {"params": ...} in float32 and, for a ResNet, {"batch_stats": ...}.

    Attributes:
      packing: packing of captions in training; None: each has a row of its own.
    """

    packing: Packing | None = None

    def setup(self):
        super().setup()
        self.text = TextTransformer(
            self.size,
            self.dtype,
            self.scan_layers,
            self.text_remat or self.remat,
            self.attention,
            packing=self.packing,
        )
        constant, biased = nn.initializers.constant, self.size.logit_bias
        scale = math.log(10 if biased else 1 / 0.07)
        self.logit_scale = self.param("logit_scale", constant(scale), (), jnp.float32)
        if biased:  # almost all pairs are negatives: at -10 they start with a small loss
            self.logit_bias = self.param("logit_bias", constant(-10), (), jnp.float32)

    def __call__(
        self,
        images: Images,
        tokens: Int[Array | np.ndarray, "batch *captions length"],
        train: bool = False,
        rows: RowIds | None = None,
    ) -> tuple[Float32[Array, "..."], ...]:
        """Embeds pairs.

        Args:
          images, train, rows: see `image_features`.
          tokens: captions, no longer than the context length; one of each image, or several as
            [b, c, length].

        Returns:
          Image and text embeddings [b, embed_dim], with several captions [b, c, embed_dim],
          L2-normalised; logit_scale [], the natural
          logarithm of the multiplier of the similarities; and, where the size has one, logit_bias
          [], which is added to them after that.
        """
        outputs = self.outputs(as_batch(images, tokens, rows), train)
        return tuple(outputs[name] for name in PAIRS if name in outputs)

    def outputs(self, batch: Inputs, train: bool = False) -> Outputs:
        """Computes the outputs named in `PAIRS`."""
        tokens = batch["tokens"]
        texts = self.encode_text(tokens.reshape(-1, tokens.shape[-1]), train)
        return {
            "image": self.encode_image(batch["image"], train, batch.get("row")),
            "text": texts.reshape(*tokens.shape[:-1], -1),
            "logit_scale": self.logit_scale,
            **({"logit_bias": self.logit_bias} if self.size.logit_bias else {}),
        }

    def encode_text(self, tokens: TokenIds, train: bool = False) -> Embeds:
        """Embeds captions, L2-normalised."""
        return l2_normalize(sharding.constrain_batch(self.text(tokens, train)))
