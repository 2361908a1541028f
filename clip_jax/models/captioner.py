"""A language model that writes the caption of an image: the slowest learner of figure 2.

The paper's LM RN50 (appendix A.2): the features of the image tower become four tokens before the
caption; a causal transformer of the text tower's shape predicts every token that follows. The
output layer is tied to the token embedding, so that it has the text tower's size.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int

from clip_jax import sharding
from clip_jax.models.image_model import ImageModel, Images, Inputs, Outputs, RowIds, TokenIds
from clip_jax.models.layers import Dtype, make_norm
from clip_jax.models.prompts import Prompts
from clip_jax.models.sizes import Size
from clip_jax.models.transformer import Transformer

PREFIX = 4  # tokens that carry the image

Prefix = Float[Array, "batch prefix channels"]
POSITIONS = 8  # tokens of each caption whose logits over the vocabulary exist at a time


class Captioner(ImageModel):
    """The image tower and the transformer that writes; pure `init` and `apply`."""

    def setup(self):
        super().setup()
        self.prefix = nn.DenseGeneral((PREFIX, self.size.text_width), dtype=self.dtype)
        self.text = CaptionTransformer(
            self.size,
            self.dtype,
            self.scan_layers,
            self.text_remat or self.remat,
            self.attention,
        )

    def outputs(self, batch: Inputs, train: bool = False) -> Outputs:
        """Computes the negative log-likelihood of captions, given their images.

        Args:
          batch: captions may be shorter than the context length.
          train: see `image_features`.

        Returns:
          "nats" [b] of each whole caption, its end token included, and "predicted" [b], its number
          of predicted tokens.
        """
        tokens = batch["tokens"]
        prefix = self._prefix(batch["image"], train, batch.get("row"))
        return {"nats": self.text(prefix, tokens), "predicted": predicted(tokens)}

    def score(self, images: Images, prompts: Prompts) -> Float32[Array, "batch prompts"]:
        """Computes the log-likelihood of each prompt given each image, a prefix at a time.

        Args:
          images: see `image_features`.
          prompts: prompts of all classes.
        """
        prefix = self._prefix(images)
        text, params = self.text.clone(parent=None), self.variables["params"]["text"]

        def one(prompt_and_end):
            prompt, end = prompt_and_end
            tokens = jnp.asarray(prompts.tokens)[prompt]
            return text.apply({"params": params}, prefix, tokens, end, method="likelihood_terms")

        # [u, b] each
        logits, normalisers = jax.lax.map(one, (prompts.prefix_prompt, prompts.prefix_end))

        def collect(prompt):
            prefix_ids, count = prompt
            within = jnp.arange(len(prefix_ids))[:, None] < count
            return logits[prefix_ids[count - 1]] - jnp.sum(
                jnp.where(within, normalisers[prefix_ids], 0), axis=0
            )

        return jax.lax.map(collect, (prompts.prefix_ids, jnp.argmax(prompts.tokens, axis=1))).T

    def _prefix(self, images: Images, train: bool = False, rows: RowIds | None = None) -> Prefix:
        """Maps images to tokens before the caption."""
        return self.prefix(self.image_features(images, train, rows))


class CaptionTransformer(nn.Module):
    """The transformer that reads image tokens and writes captions."""

    size: Size
    dtype: Dtype
    scan_layers: bool
    remat: str
    attention: str

    def setup(self):
        size, normal = self.size, nn.initializers.normal
        self.token_embed = nn.Embed(
            size.vocab_size, size.text_width, dtype=self.dtype, embedding_init=normal(0.02)
        )
        # The last token of a caption is predicted, but never read.
        shape = (size.context_length - 1, size.text_width)
        self.positions = self.param("positions", normal(0.01), shape)
        self.transformer = Transformer(
            layers=size.text_layers,
            heads=size.text_heads,
            mlp=size.text_mlp,
            activation=size.text_activation or size.activation,
            norm_eps=size.norm_eps,
            dtype=self.dtype,
            scan_layers=self.scan_layers,
            remat=self.remat,
            attention=self.attention,
            causal=True,
            paper_init=True,
            norm=size.norm,
        )
        self.ln_final = make_norm(size.norm, size.norm_eps, self.dtype, None)

    def __call__(self, prefix: Prefix, tokens: TokenIds) -> Float32[Array, " batch"]:
        states, targets = self._states(prefix, tokens[:, :-1]), tokens[:, 1:]
        nats = token_nats(states, self.token_embed.embedding, targets)
        within = jnp.arange(targets.shape[1]) < predicted(tokens)[:, None]
        return jnp.sum(jnp.where(within, nats, 0), axis=1)

    def likelihood_terms(
        self, prefix: Prefix, prompt: Int[Array, " length"], end: Int[Array, ""]
    ) -> tuple[Float32[Array, " batch"], Float32[Array, " batch"]]:
        """Computes the terms of a prompt's likelihood.

        Args:
          prefix: tokens of the images.
          prompt: token ids.
          end: a place in it.

        Returns:
          The sum of the logits of all its tokens; the log-sum-exp of the logits of all that might
          follow the token at `end`.
        """
        states = self._states(prefix, jnp.broadcast_to(prompt[:-1], (len(prefix), len(prompt) - 1)))
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        embedding = self.token_embed.embedding.astype(states.dtype)
        logits = product("bsw,sw->bs", states, embedding[prompt[1:]])
        within = jnp.arange(len(prompt) - 1) < jnp.argmax(prompt)
        following = product("bw,vw->bv", states[:, end], embedding)
        return jnp.sum(jnp.where(within, logits, 0), axis=1), jax.nn.logsumexp(following, axis=1)

    def _states(
        self, prefix: Prefix, read: Int[Array | np.ndarray, "batch read"]
    ) -> Float[Array, "batch read width"]:
        """Computes the states that predict the token after each of those read."""
        x = self.token_embed(read) + self.positions.astype(self.dtype)[: read.shape[1]]
        x = sharding.constrain_batch(jnp.concatenate([prefix, x], axis=1))
        return self.ln_final(self.transformer(x)[:, PREFIX:])


def predicted(tokens: TokenIds) -> Float32[Array, " batch"]:
    """Counts the predicted tokens of each caption, up to its end token."""
    return jnp.argmax(tokens, axis=1).astype(jnp.float32)


def token_nats(
    states: Float[Array, "batch length width"],
    embedding: Float32[Array, "vocabulary width"],
    targets: TokenIds,
) -> Float32[Array, "batch length"]:
    """Computes the cross-entropy of each target token, in nats.

    The logits of a batch of 32,768 captions would be half a terabyte. Those of a few positions are
    computed at a time, and again in the backward pass.

    Args:
      states: last states of the transformer.
      embedding: output layer; the logits are products with it.
      targets: token ids.
    """
    b, length, width = states.shape
    targets = jnp.asarray(targets)
    parts = -(-length // POSITIONS)
    padding = ((0, 0), (0, parts * POSITIONS - length))
    # No parameter here is split by the tensor axis, so it splits the captions instead.
    states, targets = map(sharding.spread_batch, (states, targets))
    states = jnp.pad(states, (*padding, (0, 0))).reshape(b, parts, POSITIONS, width)
    targets = jnp.pad(targets, padding).reshape(b, parts, POSITIONS)
    # Gathered once, not in every iteration; in float32, so that its gradient is summed up in it.
    embedding = sharding.constrain_batch(embedding, PartitionSpec())

    @jax.checkpoint
    def one(part):
        x, ids = part
        logits = jnp.einsum(
            "bsw,vw->bsv", x, embedding.astype(x.dtype), preferred_element_type=jnp.float32
        )
        chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    nats = jax.lax.map(one, (states.swapaxes(0, 1), targets.swapaxes(0, 1)))
    return nats.swapaxes(0, 1).reshape(b, -1)[:, :length]
