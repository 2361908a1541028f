"""The Vision Transformer image tower: the paper's (section 2.4), and later forms of it."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key, Shaped

from clip_jax import sharding
from clip_jax.models import positions
from clip_jax.models.attention import Tokens
from clip_jax.models.layers import Dtype, MapHead, make_norm, mean, torch_default_init
from clip_jax.models.sizes import Size
from clip_jax.models.transformer import Transformer

# Patches that an accelerator holds without padding, if the class token does not join them; see
# `attention.attend_with_token`.
FULL_TILES = 128


class VisionTransformer(nn.Module):
    """Normalised images [b, h, w, 3] -> embeddings [b, embed_dim], not yet L2-normalised.

    Attributes:
      patch_dropout: fraction of the patches left out in training; see `keep_patches`.
    """

    size: Size
    dtype: Dtype
    scan_layers: bool
    remat: str
    attention: str
    patch_dropout: float

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "batch height width 3"],
        train: bool = False,
        rows: Int[Array | np.ndarray, " batch"] | None = None,
        also: str = "",
    ) -> Any:
        """Embeds images.

        Args:
          images: normalised.
          train: drop patches, which takes `rows` and a "dropout" key.
          rows: numbers of the examples in the batch.
          also: "tokens" or "pooled": return this too; see `Returns`.

        Returns:
          [b, embed_dim]; or a pair of this and what the last block makes of all tokens
          [b, s, width], or of these the pooled features [b, width], which are projected.
        """
        size, width = self.size, self.size.image_width
        normal = nn.initializers.normal(width**-0.5)
        x = self._embed_patches(images)
        leading = self._leading_tokens()
        tokens = len(leading)  # those that are no patches
        if tokens:
            leading = jnp.broadcast_to(leading.astype(x.dtype), (x.shape[0], tokens, width))
            x = jnp.concatenate([leading, x], axis=1)
        side = math.isqrt(x.shape[1] - tokens)
        x = x + self._positions(tokens, side).astype(x.dtype)
        rope = None
        if size.image_rope:
            rope = jnp.asarray(positions.rotations(side, width // size.image_heads, tokens))
        if train and self.patch_dropout > 0:
            if rows is None:
                raise ValueError("patch dropout needs `rows`, the number of each example")
            key = self.make_rng("dropout")
            x = keep_patches(x, tokens, self.patch_dropout, key, rows)
            if rope is not None:  # of the same patches
                rope = jnp.broadcast_to(rope, (x.shape[0], *rope.shape[1:]))
                rope = keep_patches(rope, tokens, self.patch_dropout, key, rows)

        norm = partial(make_norm, size.norm, size.norm_eps, self.dtype)
        if size.pre_norm:
            x = norm("ln_pre")(x)
        if tokens == 1 and (x.shape[1] - 1) % FULL_TILES == 0:
            x = x[:, 1:], x[:, 0]
            rope = None if rope is None else rope[:, 1:]
        x = Transformer(
            layers=size.image_layers[0],
            heads=size.image_heads,
            mlp=size.image_mlp,
            activation=size.activation,
            norm_eps=size.norm_eps,
            dtype=self.dtype,
            scan_layers=self.scan_layers,
            remat=self.remat,
            attention=self.attention,
            causal=False,
            paper_init=False,
            layer_scale=size.image_layer_scale,
            qk_norm=size.image_qk_norm,
            norm=size.norm,
            name="transformer",
        )(
            x,
            read=None if also == "tokens" or size.image_pool != "class" else class_token,
            rope=rope,
        )
        # The order of the tokens does not matter to those who read them.
        all_tokens = jnp.concatenate([x[1][:, None], x[0]], axis=1) if isinstance(x, tuple) else x
        ln_post = norm("ln_post")
        if size.image_pool == "class":
            # LayerNorm works per token, so it is computed for the class token only.
            x = ln_post(sharding.constrain_batch(class_token(x)[:, 0]))
        elif size.image_pool == "avg":
            x = x[0] if isinstance(x, tuple) else x[:, tokens:]
            x = ln_post(mean(x)) if size.norm_after_pool else mean(ln_post(x))
        else:
            x = MapHead(
                heads=size.map_heads or size.image_heads,
                mlp=size.map_mlp or size.image_mlp,
                activation=size.activation,
                norm=size.norm,
                norm_eps=size.norm_eps,
                dtype=self.dtype,
                name="map_head",
            )(ln_post(all_tokens))
        self.sow("intermediates", "features", x)  # pre-projection features, for linear probes
        pooled = x
        if size.image_projection:
            x = nn.Dense(
                size.embed_dim,
                use_bias=size.image_projection_bias,
                dtype=self.dtype,
                kernel_init=normal,
                name="projection",
            )(x)
        return (x, {"tokens": all_tokens, "pooled": pooled}[also]) if also else x

    def _leading_tokens(self) -> Float[Array, "tokens width"]:
        """Returns the learned tokens before the patches: class token, then registers."""
        size, width = self.size, self.size.image_width
        normal = nn.initializers.normal(width**-0.5)
        parts = []
        if size.has_class_token:
            parts.append(self.param("class_token", normal, (width,))[None])
        if size.image_registers:
            parts.append(self.param("register_embedding", normal, (size.image_registers, width)))
        return jnp.concatenate(parts) if parts else jnp.zeros((0, width))

    def _positions(self, tokens: int, side: int) -> Float[Array | np.ndarray, "length width"]:
        """Returns what is added to the tokens that are no patches, and to the patches."""
        width = self.size.image_width
        if self.size.image_positions == "sincos":
            fixed = positions.sincos(side, width)
            return np.concatenate([np.zeros((tokens, width), np.float32), fixed])
        normal = nn.initializers.normal(width**-0.5)
        return self.param("positions", normal, (tokens + side**2, width))

    def _embed_patches(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch patches embed"]:
        side = self.size.patch_size
        assert side is not None  # else it is a ResNet
        images = images.astype(self.dtype)
        # The right and lower edge that fill no patch are left out, as by a strided convolution.
        b, h, w, channels = images.shape
        h, w = h - h % side, w - w % side
        images = images[:, :h, :w]
        # A product, where others have a convolution whose gradient XLA's CPU compiler makes
        # several times slower within a loop; on a TPU they cost the same.
        x = nn.Einsum(
            (side, side, channels, self.size.image_width),
            "bypxqc,pqcd->byxd",
            use_bias=self.size.patch_bias,
            dtype=self.dtype,
            kernel_init=torch_default_init,
            name="patch_embed",
        )(images.reshape(b, h // side, side, w // side, side, channels))
        return x.reshape(b, -1, self.size.image_width)


def class_token(x: Tokens) -> Shaped[Array, "batch 1 *features"]:
    """Picks the class token, whether it stands before the patches or apart."""
    return x[1][:, None] if isinstance(x, tuple) else x[:, :1]


def keep_patches(
    x: Float[Array, "batch tokens *width"],
    tokens: int,
    dropout: float,
    key: Key[Array, ""],
    rows: Int[Array | np.ndarray, " batch"],
) -> Float[Array, "batch kept *width"]:
    """Picks a random subset of the patches of each example (FLIP, Li et al. 2022).

    Args:
      x: tokens and patches, positions already added; or something else of each of them.
      tokens: number of leading tokens that are no patches, and always kept.
      dropout: fraction of the patches to leave out; at least one is kept.
      key: PRNG key of this step.
      rows: numbers of the examples; an example's patches depend on the key and its number alone, so
        that they are the same in another micro-batch and on another mesh.

    Returns:
      tokens + max(1, round(patches * (1 - dropout))) of each example.
    """
    patches = x.shape[1] - tokens
    count = max(1, round(patches * (1 - dropout)))

    def choose(row):
        order = jax.random.permutation(jax.random.fold_in(key, row), patches)
        return jnp.concatenate([jnp.arange(tokens), tokens + jnp.sort(order[:count])])

    kept = jax.vmap(choose)(rows)
    return jnp.take_along_axis(x, jnp.expand_dims(kept, tuple(range(2, x.ndim))), axis=1)
