"""The causal text transformer (paper section 2.4)."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from clip_jax.models.sizes import Size
from clip_jax.models.transformer import Dtype, Transformer, layer_norm


class TextTransformer(nn.Module):
    """Token ids [b, s] -> embeddings [b, embed_dim], not yet L2-normalised.

    The feature is read at the end token, the largest id of the vocabulary. Attention is causal, so
    padding behind it changes nothing and `s` may be any length up to the context length.
    """

    size: Size
    dtype: Dtype
    scan_layers: bool
    remat: str

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        size, width = self.size, self.size.text_width
        normal = nn.initializers.normal
        embed = nn.Embed(
            size.vocab_size,
            width,
            dtype=self.dtype,
            embedding_init=normal(0.02),
            name="token_embed",
        )
        positions = self.param("positions", normal(0.01), (size.context_length, width))
        x = embed(tokens) + positions[: tokens.shape[1]].astype(self.dtype)
        x = Transformer(
            layers=size.text_layers,
            heads=size.text_heads,
            dtype=self.dtype,
            scan_layers=self.scan_layers,
            remat=self.remat,
            causal=True,
            paper_init=True,
            name="transformer",
        )(x)
        end = jnp.argmax(tokens, axis=1)
        x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        x = layer_norm(self.dtype, "ln_final")(x)  # per token, so only where it is read
        return nn.Dense(
            size.embed_dim,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=normal(width**-0.5),
            name="projection",
        )(x)
