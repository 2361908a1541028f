"""CLIP: an image tower and a text tower that meet in one embedding space."""

import math

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Float32, Int

from clip_jax import sharding
from clip_jax.models.decoder import CaptionDecoder
from clip_jax.models.image_model import (
    Embeds,
    ImageModel,
    Images,
    Inputs,
    Outputs,
    RowIds,
    TokenIds,
    as_batch,
    end_places,
    flat_views,
    l2_normalize,
)
from clip_jax.models.layers import Dtype, make_norm
from clip_jax.models.packing import Packing
from clip_jax.models.sizes import Size
from clip_jax.models.text import TextTransformer

PAIRS = ("image", "text", "logit_scale", "logit_bias")  # outputs that a contrastive loss takes


class ViewHead(nn.Module):
    """The MLP by which views are compared, SLIP's (Mu et al. 2021, arXiv:2112.12750).

    It has LayerNorm in place of BatchNorm, so that no embedding depends on the rest of the batch.
    """

    size: Size
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "batch features"]) -> Float[Array, "batch view_embed"]:
        for layer in (1, 2):
            x = nn.Dense(self.size.views_mlp, dtype=self.dtype, name=f"layer_{layer}")(x)
            norm = make_norm(self.size.norm, self.size.norm_eps, self.dtype, f"ln_{layer}")
            x = nn.relu(norm(x))
        return nn.Dense(self.size.views_embed, dtype=self.dtype, name="layer_3")(x)


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
        if self.size.text_decoder_layers:
            self.decoder = CaptionDecoder(
                self.size,
                self.dtype,
                self.scan_layers,
                self.text_remat or self.remat,
                self.attention,
            )
        if self.size.views_mlp:
            self.view_head = ViewHead(self.size, self.dtype)
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
        """Computes the outputs named in `PAIRS` and, if there is a decoder, those of captioning.

        Args:
          batch: as for `__call__`.
          train: see `image_features`.

        Returns:
          Those of `__call__`; with a decoder also "nats" [b], the negative log-likelihood of the
          captions of each image, their end tokens included, and "predicted" [b], its number of
          predicted tokens; and if the batch has "views" [b, 2, h, w, 3], those embedded for
          `losses.views_loss`, as "views".
        """
        images, rows = batch["image"], batch.get("row")
        tokens = batch["tokens"].reshape(-1, batch["tokens"].shape[-1])
        if self.size.text_decoder_layers:
            image, texts, captioning = self._caption(images, tokens, train, rows)
        else:
            texts, captioning = self.encode_text(tokens, train), {}
            image = self.encode_image(images, train, rows)
        return {
            "image": image,
            "text": texts.reshape(*batch["tokens"].shape[:-1], -1),
            "logit_scale": self.logit_scale,
            **({"logit_bias": self.logit_bias} if self.size.logit_bias else {}),
            **captioning,
            **self._views(batch, train),
        }

    def _views(self, batch: Inputs, train: bool) -> Outputs:
        """Embeds further views of the images by a head of their own."""
        if not self.size.views_mlp or not ("views" in batch or self.is_initializing()):
            return {}
        views, rows = flat_views(batch.get("views", batch["image"]), batch.get("row"))
        embeds = l2_normalize(self.view_head(self.pooled_features(views, train, rows)))
        return {"views": embeds.reshape(len(batch["image"]), -1, self.size.views_embed)}

    def _caption(
        self,
        images: Images,
        tokens: Int[Array | np.ndarray, "texts length"],
        train: bool,
        rows: RowIds | None,
    ) -> tuple[Embeds, Float32[Array, "texts embed"], Outputs]:
        """Embeds images and captions, and computes the outputs of captioning."""
        image, image_tokens = self.image_features_and_tokens(images, train, rows)
        read = self.decoder.image_tokens(image_tokens, len(tokens) // len(images))
        if self.size.text_decoder_shared:
            texts = self.encode_text(tokens, train)
            states = self.text.written(tokens[:, :-1], read)
        else:
            features, states = self.text.with_states(tokens)
            texts = l2_normalize(sharding.constrain_batch(features))
            states = self.decoder.states(states[:, :-1], read)
        counts = jnp.asarray(end_places(tokens, self.size.end_token))
        nats = self.decoder.nats(states, tokens[:, 1:], counts)
        by_image = {"nats": nats, "predicted": counts}
        captioning = {
            name: x.astype(jnp.float32).reshape(len(images), -1).sum(axis=1)
            for name, x in by_image.items()
        }
        return l2_normalize(image), texts, captioning

    def encode_text(self, tokens: TokenIds, train: bool = False) -> Embeds:
        """Embeds captions, L2-normalised."""
        return l2_normalize(sharding.constrain_batch(self.text(tokens, train)))
