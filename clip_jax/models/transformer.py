"""The residual attention blocks of both transformer towers."""

import itertools
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool

from clip_jax import sharding
from clip_jax.models import attention_kernel
from clip_jax.models.attention import (
    Heads,
    QueryKeyValue,
    Tokens,
    attend,
    attend_in_kernel,
    attend_with_token,
    from_heads,
    joined,
    splits,
)
from clip_jax.models.cross_block import CrossBlock, ImageTokens
from clip_jax.models.layer_norm import LayerNorm
from clip_jax.models.layers import (
    ACTIVATIONS,
    Dtype,
    Init,
    make_norm,
    named,
    remat_layer,
    torch_default_bias_init,
    torch_default_init,
    units,
)
from clip_jax.models.positions import Rotations, rotate

# Tokens that a tile of the accelerator's memory holds.
_TILE = 8
Mask = Bool[Array, "#batch 1 query key"]
# Picks the tokens that are read, [b, s, ...] -> [b, n, ...].
Read = Callable[[Tokens], jax.Array]


class Block(nn.Module):
    """Pre-norm attention and MLP, each with a residual connection; tokens to tokens.

    All tokens are attended to, but nothing more is computed for those that are not read.
    """

    heads: int
    mlp: int  # hidden units
    activation: str
    norm_eps: float
    dtype: Dtype
    attention: str
    causal: bool
    qkv_init: Init
    mlp_init: Init
    out_init: Init  # init of both projections that end in the residual stream
    length: int | None  # tokens of a sequence before its padding; None: it has none
    layer_scale: float | None
    qk_norm: bool
    norm: str

    @nn.compact
    def __call__(
        self,
        x: Tokens,
        mask: Mask | None = None,
        read: Read | None = None,
        rope: Rotations | None = None,
    ) -> Tokens:
        each = jax.tree.map  # over the sequence and, if it stands apart, the class token
        width = jax.tree.leaves(x)[0].shape[-1]
        kernels = self.attention == "pallas" and not self.is_initializing()
        in_kernel = kernels and rope is None and not self.qk_norm and _fits_kernel(x, self.heads)
        unscaled = self.layer_scale is None
        norm = partial(LayerNorm, self.norm_eps, self.dtype, kernels, self.norm == "rms")
        dense = partial(nn.DenseGeneral, dtype=self.dtype)
        out = partial(dense, width, kernel_init=self.out_init)
        if kernels and unscaled:
            out = partial(out, promote_dtype=_constant_bias)
        product = _from_heads if in_kernel else None
        attn_out = out(axis=(-2, -1), dot_general=product, name="attn_out")
        mlp_out = out(bias_init=torch_default_bias_init(self.mlp), name="mlp_out")
        constants = None
        if kernels and unscaled:  # the second LayerNorm finds the gradients of these biases
            constants = tuple(part.variables["params"]["bias"] for part in (attn_out, mlp_out))

        qkv = QueryKeyValue(self.heads, self.dtype, self.qkv_init, name="qkv")
        y, x = norm(name="ln_1")(x)
        y = self._attend(qkv, y, mask, read, in_kernel, rope)
        x = x if read is None else read(x)
        y = self._scale("attn_scale", each(attn_out, y))
        x = named(each(jnp.add, x, y), "residual")
        y, x = norm(name="ln_2")(x, constants)
        like = x
        if kernels:
            x, y = each(_as_rows, (x, y))
        bias = torch_default_bias_init(width)
        hidden = units(self.mlp, self.activation)
        mlp_in = dense(hidden, kernel_init=self.mlp_init, bias_init=bias, name="mlp_in")
        y = named(each(mlp_in, y), "mlp")
        y = each(ACTIVATIONS[self.activation], y)
        x = each(jnp.add, x, self._scale("mlp_scale", each(mlp_out, y)))
        return each(lambda part, like: part.reshape(like.shape), x, like)

    def _scale(self, name: str, x: Tokens) -> Tokens:
        """Multiplies each channel by a learned number, if there is layer scale."""
        if self.layer_scale is None:
            return x
        width = jax.tree.leaves(x)[0].shape[-1]
        scale = self.param(name, nn.initializers.constant(self.layer_scale), (width,))
        return jax.tree.map(lambda part: part * scale.astype(part.dtype), x)

    def _attend(
        self,
        qkv: QueryKeyValue,
        x: Tokens,
        mask: Mask | None,
        read: Read | None,
        in_kernel: bool,
        rope: Rotations | None,
    ) -> Tokens:
        """Computes attention for the tokens that are read, [b, n, heads, d], or for all."""
        few = read is not None and mask is None and not self.causal  # the others are not needed

        norms = [
            make_norm(self.norm, self.norm_eps, self.dtype, name)
            if self.qk_norm
            else lambda part: part
            for name in ("ln_q", "ln_k")
        ]

        def normed(heads: Heads) -> Heads:
            query, key = (norm(part) for norm, part in zip(norms, heads))
            return query, key, heads[2]

        def turned(heads: Heads, queries: Read = lambda of: of) -> Heads:
            query, key, value = normed(heads)
            if rope is None:
                return query, key, value
            return rotate(query, queries(rope)), rotate(key, rope), value

        if in_kernel and not few:
            if mask is None and self.causal:
                mask = jnp.tri(x.shape[1], dtype=bool)[None, None]
            projected, bias = qkv.for_kernel(x)
            projected = named(projected, "qkv")
            y = attend_in_kernel(projected, bias, mask, self.length)  # it names what it keeps
        elif isinstance(x, tuple):
            sequence, token = x  # which is not turned
            projected = named((turned(qkv(sequence)), normed(qkv(token))), "qkv")
            y = named(attend_with_token(*projected), "attention")
        elif few:
            return attend(turned(qkv(x[:, : self.length], read(x)), read))
        else:
            projected = named(turned(qkv(x)), "qkv")
            y = named(attend(projected, mask, self.causal, self.attention), "attention")
        return y if read is None else read(y)


def _fits_kernel(x: Tokens, heads: int) -> bool:
    batch, length, width = jax.tree.leaves(x)[0].shape
    return not attention_kernel.misfit(width // heads, length) and splits(batch)


def _fill_tiles(x: Array, heads: int) -> tuple[Array, Mask | None, int | None]:
    """Joins short sequences, or pads others.

    Returns:
      The tokens, a mask that keeps joined sequences apart, and the length of padded ones.
    """
    b, length, width = x.shape
    together = joined(b, length)
    rows = x.reshape(b // together, -1, width)
    if not _fits_kernel(rows, heads):
        return x, None, None
    if together > 1:
        owner = jnp.arange(rows.shape[1]) // length
        return rows, (owner[:, None] == owner)[None, None], None
    padding = -length % _TILE
    x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
    return x, None, length if padding else None


def _constant_bias(x: jax.Array, kernel: jax.Array, bias: jax.Array, **options: Any) -> list:
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, **options)
    return [x, kernel, jax.lax.stop_gradient(bias)]


def _from_heads(x: jax.Array, kernel: jax.Array, *others: Any, **options: Any) -> jax.Array:
    if x.ndim == 4:
        return from_heads(x, kernel)
    return jax.lax.dot_general(x, kernel, *others, **options)


def _as_rows(x: jax.Array) -> jax.Array:
    """Joins examples and tokens where this moves nothing: XLA's products are faster then."""
    return x.reshape(-1, x.shape[-1]) if x.ndim == 3 and x.shape[1] % _TILE == 0 else x


class Transformer(nn.Module):
    """A stack of blocks: tokens [b, s, w], or with a token apart ([b, s, w], [b, w]), to the same.

    Where only some tokens are read in the end, the last block computes no others. Where kernels for
    TPUs compute it, short sequences are joined, with a mask that keeps them apart, and one that
    does not fill its last tile is padded: it takes the memory anyhow.

    Parameters of all layers are stacked along a leading axis, whether the layers are scanned or
    unrolled, so that one checkpoint and one sharding rule serve both. The collection "learns" may
    say which layers of which parameters learn, as `optim.Factors.learns` does. Of the others no
    gradient is computed; layers that learn differently are scanned apart.

    Attributes:
      mlp: hidden units of each block.
      activation: their activation, a name in `layers.ACTIVATIONS`.
      norm_eps: addition to the variance of the norms.
      scan_layers: run the layers in `lax.scan` (compiles fast) or unroll them.
      remat: recomputation in the backward pass; see `layers.remat_layer`.
      attention: the form of attention that computes it; see `attention.FORMS`.
      causal: without a mask, each token sees only those up to itself.
      paper_init: the scaled normal initialisation of the published text tower; else PyTorch's
        default for attention and linear layers, as in the published ViT.
      layer_scale: initial multiplier of the channels of each branch, learned (Touvron et al. 2021);
        None: there is none.
      qk_norm: whether queries and keys are normalised in each head (Dehghani et al. 2023). With it,
        attention does not go through the kernel for TPUs.
      norm: kind of the norms, "layer" or "rms"; the latter do not go through the kernel for TPUs.
      cross_layers: layers that a `CrossBlock` follows where images are given, evenly spaced from
        the first; divides `layers`.
    """

    layers: int
    heads: int
    mlp: int
    activation: str
    norm_eps: float
    dtype: Dtype
    scan_layers: bool
    remat: str
    attention: str
    causal: bool
    paper_init: bool
    layer_scale: float | None = None
    qk_norm: bool = False
    norm: str = "layer"
    cross_layers: int = 0

    @nn.compact
    def __call__(
        self,
        x: Tokens,
        mask: Mask | None = None,
        read: Read | None = None,
        rope: Rotations | None = None,
        image: ImageTokens | None = None,
    ) -> Tokens:
        """Runs all blocks.

        Args:
          x: tokens.
          mask: True for the keys (last) that each query sees; None: all, or in a causal transformer
            those up to itself.
          read: picks the tokens to return, [b, s, ...] -> [b, n, ...]; None: all.
          rope: rotations of queries and keys, for the tokens but one apart; None: there are none.
            With them, attention does not go through the kernel for TPUs.
          image: tokens that `cross_layers` attend to; all tokens are returned. None: no such layer
            runs.
        """
        shape, length = None, None
        if (
            self.attention == "pallas"
            and not (isinstance(x, tuple) or self.causal)
            and mask is None
            and rope is None
            and not self.qk_norm
        ):
            shape = x.shape
            x, mask, length = _fill_tiles(x, self.heads)
        width = jax.tree.leaves(x)[0].shape[-1]
        block = self._block(width, length)
        sample = jax.tree.map(lambda part: jnp.zeros((1, *part.shape[1:]), self.dtype), x)

        def init_stack(key: jax.Array):
            keys = jax.random.split(key, self.layers)
            return jax.vmap(lambda k: block.init(k, sample)["params"])(keys)

        params = self.param("blocks", init_stack)

        cross_block = self._cross_block(width)
        cross_params = None
        if self.cross_layers:
            start = partial(self._init_cross, cross_block, width)
            cross_params = self.param("cross", start)["blocks"]

        def layer(x, layer_params, mask=mask, read=None):
            # Without the constraint the partitioner may replicate activations under FSDP.
            x = jax.tree.map(sharding.constrain_batch, x)
            return block.apply({"params": layer_params}, x, mask, read, rope), None

        if image is not None:
            every = self.layers // self.cross_layers

            def group(x, params):  # a layer, its attention to the image, and those up to the next
                own, cross = params
                for i in range(every):
                    x, _ = layer(x, jax.tree.map(operator.itemgetter(i), own))
                    if i == 0:
                        x = cross_block.apply({"params": cross}, x, image)
                return x, None

            groups = jax.tree.map(
                lambda leaf: leaf.reshape(self.cross_layers, every, *leaf.shape[1:]), params
            )
            unroll = 1 if self.scan_layers else self.cross_layers
            group = remat_layer(group, self.remat, scanned=self.scan_layers)
            return jax.lax.scan(group, x, (groups, cross_params), unroll=unroll)[0]

        in_scan = self.layers - (read is not None) if self.scan_layers else 0
        learn = _learning(self.get_variable("learns", "blocks"), self.layers)
        scans = [len([*alike]) for _, alike in itertools.groupby(learn[:in_scan])]
        sizes = scans + [1] * (self.layers - in_scan)
        first = 0
        for size, part in zip(sizes, _split(params, sizes, learn)):
            if first < in_scan:
                x, _ = jax.lax.scan(remat_layer(layer, self.remat, scanned=True), x, part)
            else:
                last = first == self.layers - 1
                one = partial(layer, read=read if last else None)
                if last and read and shape and length is None:
                    x, one = x.reshape(shape), partial(one, mask=None)
                part = jax.tree.map(lambda leaf: leaf.squeeze(0), part)
                x, _ = remat_layer(one, self.remat, scanned=False)(x, part)
            first += size
        if read is None and shape:
            x = x.reshape(shape) if length is None else x[:, :length]
        return x

    def _block(self, width: int, length: int | None) -> Block:
        qkv_init, mlp_init, out_init = self._inits(width)
        # parent=None: the stack holds the parameters, the block is only their function.
        return Block(
            heads=self.heads,
            mlp=self.mlp,
            activation=self.activation,
            norm_eps=self.norm_eps,
            dtype=self.dtype,
            attention=self.attention,
            causal=self.causal,
            qkv_init=qkv_init,
            mlp_init=mlp_init,
            out_init=out_init,
            length=length,
            layer_scale=self.layer_scale,
            qk_norm=self.qk_norm,
            norm=self.norm,
            parent=None,
        )

    def _cross_block(self, width: int) -> CrossBlock:
        inits = self._inits(width)
        form = self.heads, self.mlp, self.activation, self.norm_eps, self.dtype
        return CrossBlock(*form, *inits, self.norm, parent=None)

    def _init_cross(self, block: CrossBlock, width: int, key: jax.Array) -> Any:
        sample = jnp.zeros((1, 1, width), self.dtype)
        keys = jax.random.split(key, self.cross_layers)
        params = jax.vmap(lambda k: block.init(k, sample, sample)["params"])(keys)
        return {"blocks": params}  # stacked like the others, under a path like theirs

    def _inits(self, width: int) -> tuple[Init, Init, Init]:
        """Returns the init of queries, keys and values, of the MLP, and of the residual stream."""
        if not self.paper_init:
            return nn.initializers.xavier_uniform(), torch_default_init, torch_default_init
        normal = nn.initializers.normal
        out_init = normal(width**-0.5 * (2 * self.layers) ** -0.5)
        return normal(width**-0.5), normal((2 * width) ** -0.5), out_init


def _learning(learns: Any, layers: int) -> list[tuple[bool, ...]]:
    """Returns, for each layer, which of its parameters learn; none: all of them do.

    Args:
      learns: by parameter of the stack, one truth value or those of its layers.
      layers: number of layers.
    """
    leaves = [np.broadcast_to(leaf, layers).tolist() for leaf in jax.tree.leaves(learns)]
    return list(zip(*leaves)) or [()] * layers


def _split(params: Any, sizes: list[int], learn: list[tuple[bool, ...]]) -> list[Any]:
    """Splits parameters into those of groups of layers, still stacked; what is frozen is constant.

    In one `lax.split`, so that gradients come back in one concatenation.
    """
    leaves, treedef = jax.tree.flatten(params)
    split = zip(*(jax.lax.split(leaf, sizes, axis=0) for leaf in leaves))
    firsts = itertools.accumulate(sizes, initial=0)
    return [
        treedef.unflatten(
            part if learns else jax.lax.stop_gradient(part)
            for part, learns in itertools.zip_longest(parts, learn[first], fillvalue=True)
        )
        for parts, first in zip(split, firsts)
    ]
