"""The block by which a text decoder looks at the image."""

from functools import partial

from flax import linen as nn
from jaxtyping import Array, Float

from clip_jax.models.attention import QueryKeyValue, attend
from clip_jax.models.layers import ACTIVATIONS, Dtype, Init, make_norm, named, units

ImageTokens = Float[Array, "batch image_tokens width"]


class CrossBlock(nn.Module):
    """Pre-norm attention from text tokens to image tokens and MLP, both with residual connections.

    The block of open_clip's CoCa and MaMMUT. Both kinds of tokens have the same width.
    """

    heads: int
    mlp: int  # hidden units
    activation: str
    norm_eps: float
    dtype: Dtype
    qkv_init: Init
    mlp_init: Init
    out_init: Init  # init of both projections that end in the residual stream
    norm: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], image: ImageTokens
    ) -> Float[Array, "batch length width"]:
        norm = partial(make_norm, self.norm, self.norm_eps, self.dtype)
        dense = partial(nn.DenseGeneral, dtype=self.dtype)
        out = partial(dense, x.shape[-1], kernel_init=self.out_init)
        qkv = QueryKeyValue(self.heads, self.dtype, self.qkv_init, name="qkv")
        projected = named(qkv(norm("ln_image")(image), norm("ln_1")(x)), "qkv")
        y = named(attend(projected), "attention")
        x = named(x + out(axis=(-2, -1), name="attn_out")(y), "residual")
        mlp_in = dense(units(self.mlp, self.activation), kernel_init=self.mlp_init, name="mlp_in")
        y = named(mlp_in(norm("ln_2")(x)), "mlp")
        return x + out(name="mlp_out")(ACTIVATIONS[self.activation](y))
