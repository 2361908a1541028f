"""The text transformer: the paper's causal one (section 2.4), and SigLIP's form of it."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from clip_jax.models.sizes import Size
from clip_jax.models.transformer import Dtype, Transformer, layer_norm


class TextTransformer(nn.Module):
    """Token ids [b, s] -> embeddings [b, embed_dim], not yet L2-normalised.

    The paper's reads the feature at the end token, the largest id of the vocabulary. Its attention
    is causal, so padding behind that changes nothing and `s` may be any length up to the context
    length. Where the last token is read instead, `s` must be the context length.
    """

    size: Size
    dtype: Dtype
    scan_layers: bool
    remat: str

    def setup(self):
        size, width = self.size, self.size.text_width
        normal = nn.initializers.normal
        self.token_embed = nn.Embed(
            size.vocab_size, width, dtype=self.dtype, embedding_init=normal(0.02)
        )
        self.positions = self.param("positions", normal(0.01), (size.context_length, width))
        self.transformer = Transformer(
            layers=size.text_layers,
            heads=size.text_heads,
            mlp=size.text_mlp,
            activation=size.activation,
            norm_eps=size.norm_eps,
            dtype=self.dtype,
            scan_layers=self.scan_layers,
            remat=self.remat,
            causal=size.text_causal,
            paper_init=True,
        )
        self.ln_final = layer_norm(size.norm_eps, self.dtype, None)
        self.projection = nn.Dense(
            size.embed_dim,
            use_bias=size.text_projection_bias,
            dtype=self.dtype,
            kernel_init=normal(width**-0.5),
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        features = self._read(tokens)
        return self.projection(self.ln_final(features))  # per token, so only where it is read

    def _read(self, tokens: jax.Array) -> jax.Array:
        """int32 [b, s] -> [b, w] of the tokens that stand for the captions."""
        x = self.token_embed(tokens) + self.positions[: tokens.shape[1]].astype(self.dtype)
        x = self.transformer(x)
        if self.size.text_pool == "last":
            return x[:, -1]
        end = jnp.argmax(tokens, axis=1)
        return jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
