"""A language model that writes the caption of an image: figure 2's slowest learner.

As the paper's LM RN50 (appendix A.2): what the image tower says becomes four tokens, which stand
before the caption; a causal transformer of the text tower's shapes predicts every token that
follows. The output layer is the token embedding again, so that it has the text tower's size.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from clip_jax import sharding
from clip_jax.models.image_model import ImageModel
from clip_jax.models.prompts import Prompts
from clip_jax.models.sizes import Size
from clip_jax.models.transformer import Dtype, Transformer, layer_norm

PREFIX = 4  # tokens that stand for the image
POSITIONS = 8  # of each caption, whose logits over the vocabulary exist at a time


class Captioner(ImageModel):
    """The image tower and the transformer that writes; pure `init` and `apply`."""

    def setup(self):
        super().setup()
        self.prefix = nn.DenseGeneral((PREFIX, self.size.text_width), dtype=self.dtype)
        self.text = CaptionTransformer(self.size, self.dtype, self.scan_layers, self.remat)

    def __call__(
        self,
        images: jax.Array,
        tokens: jax.Array,
        train: bool = False,
        rows: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """How surprising the captions are, given their images.

        Args:
          images, train, rows: as in `image_features`.
          tokens: int32 [b, s], s at most the context length.

        Returns:
          float32 [b], nats of a whole caption, its end token included; float32 [b], how many
          tokens were predicted.
        """
        return self.text(self._prefix(images, train, rows), tokens), predicted(tokens)

    def score(self, images: jax.Array, prompts: Prompts) -> jax.Array:
        """Log-likelihood of each prompt given each image, a beginning of a prompt at a time.

        Args:
          images: [b, h, w, 3], as in `image_features`.
          prompts: p of them.

        Returns:
          float32 [b, p].
        """
        prefix = self._prefix(images)
        text, params = self.text.clone(parent=None), self.variables["params"]["text"]

        def one(beginning: tuple[jax.Array, jax.Array]) -> Any:
            row, end = beginning
            tokens = jnp.asarray(prompts.tokens)[row]
            return text.apply({"params": params}, prefix, tokens, end, method="weigh")

        logits, normalisers = jax.lax.map(one, (prompts.rows, prompts.ends))  # [u, b] each

        def collect(prompt: tuple[jax.Array, jax.Array]) -> jax.Array:
            beginnings, count = prompt
            within = jnp.arange(len(beginnings))[:, None] < count
            return logits[beginnings[count - 1]] - jnp.sum(
                jnp.where(within, normalisers[beginnings], 0), axis=0
            )

        return jax.lax.map(collect, (prompts.beginnings, jnp.argmax(prompts.tokens, axis=1))).T

    def _prefix(self, images: jax.Array, train=False, rows=None) -> jax.Array:
        """[b, PREFIX, text_width] of images."""
        return self.prefix(self.image_features(images, train, rows))


class CaptionTransformer(nn.Module):
    """Image tokens [b, PREFIX, w] and captions [b, s] -> nats of the captions, float32 [b]."""

    size: Size
    dtype: Dtype
    scan_layers: bool
    remat: str

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
            activation=size.activation,
            norm_eps=size.norm_eps,
            dtype=self.dtype,
            scan_layers=self.scan_layers,
            remat=self.remat,
            causal=True,
            paper_init=True,
        )
        self.ln_final = layer_norm(size.norm_eps, self.dtype, None)

    def __call__(self, prefix: jax.Array, tokens: jax.Array) -> jax.Array:
        states, wanted = self._states(prefix, tokens[:, :-1]), tokens[:, 1:]
        nats = token_nats(states, self.token_embed.embedding, wanted)
        within = jnp.arange(wanted.shape[1]) < predicted(tokens)[:, None]
        return jnp.sum(jnp.where(within, nats, 0), axis=1)

    def weigh(
        self, prefix: jax.Array, prompt: jax.Array, end: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """What makes up the likelihood of a prompt.

        Args:
          prefix: [b, PREFIX, w].
          prompt: int32 [s].
          end: int32 [], a place in it.

        Returns:
          float32 [b], the sum of the logits of all its tokens; float32 [b], the log-sum-exp of the
          logits of all that might follow the token at `end`.
        """
        states = self._states(prefix, jnp.broadcast_to(prompt[:-1], (len(prefix), len(prompt) - 1)))
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        embedding = self.token_embed.embedding.astype(states.dtype)
        logits = product("bsw,sw->bs", states, embedding[prompt[1:]])
        within = jnp.arange(len(prompt) - 1) < jnp.argmax(prompt)
        following = product("bw,vw->bv", states[:, end], embedding)
        return jnp.sum(jnp.where(within, logits, 0), axis=1), jax.nn.logsumexp(following, axis=1)

    def _states(self, prefix: jax.Array, read: jax.Array) -> jax.Array:
        """From which the token behind each of those read [b, s] is predicted: [b, s, w]."""
        x = self.token_embed(read) + self.positions.astype(self.dtype)[: read.shape[1]]
        x = sharding.constrain_batch(jnp.concatenate([prefix, x], axis=1))
        return self.ln_final(self.transformer(x)[:, PREFIX:])


def predicted(tokens: jax.Array) -> jax.Array:
    """Tokens of each caption [b, s] that are predicted, the end token the last: float32 [b]."""
    return jnp.argmax(tokens, axis=1).astype(jnp.float32)


def token_nats(states: jax.Array, embedding: jax.Array, wanted: jax.Array) -> jax.Array:
    """What each wanted token costs: minus the logarithm of its softmax probability.

    The logits of a batch of 32,768 captions would be half a terabyte: those of a few positions are
    made at a time, and made again in the backward pass.

    Args:
      states: [b, s, w], from which the logits are predicted.
      embedding: float32 [vocabulary, w]; the logits are products with it.
      wanted: int32 [b, s].

    Returns:
      float32 [b, s].
    """
    b, length, width = states.shape
    parts = -(-length // POSITIONS)
    padding = ((0, 0), (0, parts * POSITIONS - length))
    # No parameter here is split by the tensor axis, which takes its share of the captions.
    states, wanted = map(sharding.spread_batch, (states, wanted))
    states = jnp.pad(states, (*padding, (0, 0))).reshape(b, parts, POSITIONS, width)
    wanted = jnp.pad(wanted, padding).reshape(b, parts, POSITIONS)
    # Gathered once, not in every turn; in float32, so that its gradient is summed up in it.
    embedding = sharding.constrain_batch(embedding, PartitionSpec())

    @jax.checkpoint
    def one(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, ids = part
        logits = jnp.einsum(
            "bsw,vw->bsv", x, embedding.astype(x.dtype), preferred_element_type=jnp.float32
        )
        chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    nats = jax.lax.map(one, (states.swapaxes(0, 1), wanted.swapaxes(0, 1)))
    return nats.swapaxes(0, 1).reshape(b, -1)[:, :length]
