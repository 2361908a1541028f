"""The decoder that writes captions beside a contrastive model, in two forms.

CoCa (Yu et al. 2022, arXiv:2205.01917): further layers follow the causal text tower, each with
attention to the image. MaMMUT (Kuo et al. 2023, arXiv:2303.16839): the text tower itself runs a
second time, causal and with attention to the image after some of its layers.

Both attend to all tokens of the image tower, as openMaMMUT does; CoCa pools them by 256 queries
before. The output layer is not tied to the token embedding, as in open_clip.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Float32

from clip_jax import sharding
from clip_jax.models.captioner import token_nats
from clip_jax.models.cross_block import ImageTokens
from clip_jax.models.image_model import RowIds, TokenIds
from clip_jax.models.layers import Dtype, make_norm
from clip_jax.models.sizes import Size
from clip_jax.models.transformer import Transformer


class CaptionDecoder(nn.Module):
    """The layers beside both towers that write: those of its own, if any, and the output."""

    size: Size
    dtype: Dtype
    scan_layers: bool
    remat: str
    attention: str

    def setup(self):
        size, normal = self.size, nn.initializers.normal
        self.image_projection = nn.Dense(
            size.text_width,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=normal(size.image_width**-0.5),
        )
        self.output_embedding = self.param(
            "output_embedding", normal(0.02), (size.vocab_size, size.text_width)
        )
        if not size.text_decoder_shared:
            self.transformer = Transformer(
                layers=size.text_decoder_layers,
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
                qk_norm=size.text_qk_norm,
                norm=size.norm,
                cross_layers=size.text_decoder_layers,
            )
            self.ln_final = make_norm(size.norm, size.norm_eps, self.dtype, None)

    def image_tokens(
        self, tokens: Float[Array, "batch image_tokens channels"], captions: int
    ) -> Float[Array, "texts image_tokens width"]:
        """Maps the tokens of images to the text's width, and repeats them for each caption."""
        projected = self.image_projection(tokens)
        return projected if captions == 1 else jnp.repeat(projected, captions, axis=0)

    def states(
        self, states: Float[Array, "batch length width"], image: ImageTokens
    ) -> Float[Array, "batch length width"]:
        """Computes the states that predict the next tokens from those of a causal text tower."""
        return self.ln_final(self.transformer(states, image=image))

    def nats(
        self, states: Float[Array, "batch length width"], targets: TokenIds, counts: RowIds
    ) -> Float32[Array, " batch"]:
        """Computes the negative log-likelihood of whole captions.

        Args:
          states: those that predict the targets.
          targets: tokens after the first of each caption.
          counts: number of targets that count, up to the end token.
        """
        nats = token_nats(sharding.constrain_batch(states), self.output_embedding, targets)
        within = jnp.arange(nats.shape[1]) < jnp.asarray(counts)[:, None]
        return jnp.sum(jnp.where(within, nats, 0), axis=1)
