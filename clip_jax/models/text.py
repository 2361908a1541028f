"""The text transformer: the paper's causal one (section 2.4), and later forms of it."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from clip_jax import sharding
from clip_jax.models.cross_block import ImageTokens
from clip_jax.models.image_model import TokenIds, end_places
from clip_jax.models.layers import Dtype, MapHead, make_norm, mean
from clip_jax.models.packing import Packing, Tower, end_features, pick
from clip_jax.models.sizes import Size
from clip_jax.models.transformer import Mask, Read, Transformer

# By `Size.text_pool`, the place that is read in every row.
_PLACES = {"first": lambda x: x[:, :1], "last": lambda x: x[:, -1:]}


class TextTransformer(nn.Module):
    """Embeds token ids, not yet L2-normalised.

    The paper's tower reads the feature at the end token, the largest id of the vocabulary unless
    the size names another. Its attention is causal, so padding after that changes nothing, and
    captions may have any length up to the context length. Where another token is read instead, or
    all of them, they must have the context length.
    A bag of words is the mean of the embedded words: it has no positions and no layers.

    Attributes:
      packing: packing of captions in training; None: each has a row of its own.
    """

    size: Size
    dtype: Dtype
    scan_layers: bool
    remat: str
    attention: str
    packing: Packing | None

    def setup(self):
        size, width = self.size, self.size.text_width
        normal = nn.initializers.normal
        self.token_embed = nn.Embed(
            size.vocab_size, width, dtype=self.dtype, embedding_init=normal(0.02)
        )
        if size.text_pool != "bag":
            self.positions = self.param("positions", normal(0.01), (size.context_length, width))
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
                causal=size.text_causal,
                paper_init=True,
                qk_norm=size.text_qk_norm,
                cross_layers=size.text_decoder_layers if size.text_decoder_shared else 0,
                norm=size.norm,
            )
        self.ln_final = make_norm(size.norm, size.norm_eps, self.dtype, None)
        if size.text_pool == "map":
            self.map_head = MapHead(
                heads=size.text_heads,
                mlp=size.text_mlp,
                activation=size.text_activation or size.activation,
                norm=size.norm,
                norm_eps=size.norm_eps,
                dtype=self.dtype,
            )
        if size.text_projection:
            self.projection = nn.Dense(
                size.embed_dim,
                use_bias=size.text_projection_bias,
                dtype=self.dtype,
                kernel_init=normal(width**-0.5),
            )

    def __call__(self, tokens: TokenIds, train: bool = False) -> Float[Array, "batch embed"]:
        if train and self.packing is not None and not self.is_initializing():
            return self._project(self._read_packed(tokens))
        return self._project(self._read(tokens))

    def with_states(
        self, tokens: TokenIds
    ) -> tuple[Float[Array, "batch embed"], Float[Array, "batch length width"]]:
        """Embeds captions, and returns the states of the last layer at all tokens too."""
        states = self.states(tokens)
        all_read = self.size.text_pool in ("avg", "map")
        pooled = states if all_read else self._reader(tokens)(states)[:, 0]
        return self._project(pooled), states

    def _project(
        self, features: Float[Array, "batch *tokens width"]
    ) -> Float[Array, "batch embed"]:
        """Normalises and projects the features of the tokens that stand for the captions."""
        features = sharding.constrain_batch(features)
        # Both work per token, so they are computed for the tokens read only.
        features = self.ln_final(features)
        if self.size.text_pool == "avg":
            features = mean(features)
        elif self.size.text_pool == "map":
            features = self.map_head(features)
        return self.projection(features) if self.size.text_projection else features

    def states(
        self,
        tokens: TokenIds,
        positions: Int[Array, "batch length"] | None = None,
        mask: Mask | None = None,
        read: Read | None = None,
        image: ImageTokens | None = None,
    ) -> Float[Array, "rows read width"]:
        """Computes the states of the last layer, at all tokens or those that `read` picks.

        Args:
          tokens: token ids.
          positions: places of the tokens within their captions; None: 0, 1, 2, ...
          mask: True for the keys (last) that each query sees; None: all, or where causal those up
            to itself.
          read: picks the tokens to return, [b, s, ...] -> [b, n, ...]; None: all.
          image: tokens of images that some layers attend to; see `Transformer`.
        """
        learned = self.positions.astype(self.dtype)
        if positions is None:
            learned = learned[: tokens.shape[1]]
        else:  # from the whole table: else the partitioner looks up parts of every activation
            learned = sharding.constrain_batch(learned, PartitionSpec())[positions]
        x = self.token_embed(tokens) + learned
        learns = self.variables.get("learns")
        if learns and not np.any(jax.tree.leaves([learns["token_embed"], learns["positions"]])):
            x = jax.lax.stop_gradient(x)  # packing hides that its parameters are constants
        return self.transformer(x, mask, read, image=image)

    def written(self, tokens: TokenIds, image: ImageTokens) -> Float[Array, "batch length width"]:
        """Computes the states that predict the token after each of those read, given images."""
        causal = jnp.tri(tokens.shape[1], dtype=bool)[None, None]
        return self.ln_final(self.states(tokens, mask=causal, image=image))

    def _read(self, tokens: TokenIds) -> Float[Array, "batch *tokens width"]:
        """Computes the features of the tokens that stand for the captions, one or all of each."""
        if self.size.text_pool == "bag":
            own = own_tokens(tokens)[:, :, None]
            words = jnp.sum(jnp.where(own, self.token_embed(tokens), 0), axis=1, dtype=jnp.float32)
            return (words / jnp.maximum(jnp.sum(own, axis=1), 1)).astype(self.dtype)
        if self.size.text_pool in ("avg", "map"):
            return self.states(tokens)
        return self.states(tokens, read=self._reader(tokens))[:, 0]

    def _reader(self, tokens: TokenIds) -> Read:
        """Returns the function that picks the token that stands for each caption."""
        if self.size.text_pool in _PLACES:
            return _PLACES[self.size.text_pool]
        end = jnp.asarray(end_places(tokens, self.size.end_token))
        return lambda x: pick(x, end[:, None])

    def _read_packed(self, tokens: TokenIds) -> Float[Array, "batch width"]:
        """Computes the same from packed rows."""
        assert self.packing is not None
        read = ("token_embed", "positions", "transformer")
        params = {name: self.variables["params"][name] for name in read}
        # The second is for further rounds. They are rare, so it is scanned, which compiles faster.
        towers = self._tower(self.scan_layers), self._tower(scan_layers=True)
        return end_features(*towers, params, tokens, self.packing, self.size.end_token)

    def _tower(self, scan_layers: bool) -> Tower:
        """Returns `states` as a pure function: Flax modules cannot be called in a loop of JAX."""
        module = self.clone(parent=None, scan_layers=scan_layers)
        learns = self.variables.get("learns", {})

        def tower(params: Any, *rows: Any) -> jax.Array:
            variables = {"params": params, "learns": learns}
            x = module.apply(variables, *rows, method=TextTransformer.states)
            return cast(jax.Array, x)

        return tower


def own_tokens(tokens: TokenIds) -> Bool[Array, "batch length"]:
    """Masks the ids that are words, between the start and the end token."""
    places = jnp.arange(tokens.shape[1])
    return (places > 0) & (places < jnp.argmax(tokens, axis=1)[:, None])
