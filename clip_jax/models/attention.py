"""Multi-head attention, in the forms that the towers need."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from clip_jax import sharding
from clip_jax.models import attention_kernel
from clip_jax.models.layers import Dtype
from clip_jax.models.sizes import Size

# Tokens [b, s, ...], or those of a sequence and, apart from them, one more token per example:
# ([b, s, ...], [b, ...]).
Tokens = Any
# Short sequences that are attended to as one, at most: the work on logits grows with them.
_MOST = 8
# Queries, keys and values.
Heads = tuple[Float[Array, "... heads d"], Float[Array, "... heads d"], Float[Array, "... heads d"]]


class QueryKeyValue(nn.Module):
    """The projections to queries, keys and values: [..., w] -> three of [..., heads, w / heads].

    One parameter of shape [w, 3, heads, w / heads], but three products: the parts of one product
    would have to be copied into the layout that attention takes. The kernel takes them as one.
    """

    heads: int
    dtype: Dtype
    kernel_init: nn.initializers.Initializer

    def __call__(
        self,
        x: Float[Array, "*keys width"],
        queries_from: Float[Array, "*queries width"] | None = None,
    ) -> Heads:
        """Projects tokens.

        Args:
          x: tokens to project to keys and values.
          queries_from: tokens to project to queries; None: `x`.
        """
        queries_from = x if queries_from is None else queries_from
        kernel, bias = self._parameters(x.shape[-1])
        x, queries_from, kernel, bias = nn.dtypes.promote_dtype(
            x, queries_from, kernel, bias, dtype=self.dtype
        )
        query, key, value = (
            jnp.einsum("...w,whd->...hd", part, kernel[:, i]) + bias[i]
            for i, part in enumerate((queries_from, x, x))
        )
        return query, key, value

    def for_kernel(self, x: Tokens) -> tuple[attention_kernel.Projected, Float[Array, "3 heads d"]]:
        """Projects tokens for `attend_in_kernel`, which takes the bias for its gradient."""
        sequence, token = x if isinstance(x, tuple) else (x, None)
        kernel, bias = self._parameters(sequence.shape[-1])
        sequence, kernel, bias = nn.dtypes.promote_dtype(sequence, kernel, bias, dtype=self.dtype)
        sequence = _to_heads(sequence, kernel) + jax.lax.stop_gradient(bias)[..., None]
        if token is not None:
            token = jnp.einsum("bw,wphd->bphd", token.astype(self.dtype), kernel) + bias
        return attention_kernel.Projected(sequence, token), bias

    @nn.compact
    def _parameters(self, width: int) -> tuple[jax.Array, jax.Array]:
        shape = (3, self.heads, width // self.heads)

        def kernel_init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return self.kernel_init(key, (width, 3 * width)).reshape(shape)  # as one matrix

        kernel = self.param("kernel", kernel_init, (width, *shape))
        return kernel, self.param("bias", nn.initializers.zeros, shape)


# ---- The projections beside the kernel. XLA does well with heads and features as dimensions of
# their own, but in the gradients of the weights, where it pads the features to 128 lanes. So these
# are products of matrices, and a barrier keeps it from splitting them again.


@jax.custom_vjp
def _to_heads(
    x: Float[Array, "b s w"], kernel: Float[Array, "w 3 heads d"]
) -> Float[Array, "b 3 heads d s"]:
    return jnp.einsum("bsw,wphd->bphds", x, kernel)


def _to_heads_gradients(
    residuals: tuple[jax.Array, jax.Array], g: Float[Array, "b 3 heads d s"]
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    of_x = jnp.einsum("bphds,wphd->bsw", g, kernel)
    if jax.sharding.get_abstract_mesh().shape.get("tensor", 1) == 1:
        g = g.reshape(len(g), -1, g.shape[-1])  # heads that are split over devices do not join
    of_kernel = jax.lax.optimization_barrier(jnp.einsum("bsw,b...s->w...", x, g))
    return of_x, of_kernel.reshape(kernel.shape)


_to_heads.defvjp(lambda x, kernel: (_to_heads(x, kernel), (x, kernel)), _to_heads_gradients)


@jax.custom_vjp
def from_heads(
    y: Float[Array, "b s heads d"], kernel: Float[Array, "heads d w"]
) -> Float[Array, "b s w"]:
    """Projects what `attend_in_kernel` finds for a sequence."""
    return jnp.einsum("bshd,hdw->bsw", y, kernel)


def _from_heads_gradients(
    residuals: tuple[jax.Array, jax.Array], g: Float[Array, "b s w"]
) -> tuple[jax.Array, jax.Array]:
    y, kernel = residuals
    of_y = jnp.einsum("bsw,hdw->bshd", g, kernel)
    y = y.transpose(0, 2, 3, 1).reshape(len(y), -1, y.shape[1])  # as the kernel wrote it
    of_kernel = jax.lax.optimization_barrier(jnp.einsum("bns,bsw->nw", y, g))
    return of_y, of_kernel.reshape(kernel.shape)


from_heads.defvjp(lambda y, kernel: (from_heads(y, kernel), (y, kernel)), _from_heads_gradients)


def misfits(size: Size, context_length: int, batch: int) -> dict[str, str]:
    """Returns the towers of a model that the kernel for TPUs does not fit, and why.

    Args:
      size: shapes of the model.
      context_length: tokens in a row of the text tower.
      batch: examples that a tower embeds at a time.
    """
    shapes = {}
    if size.patch_size is not None:
        tokens = size.image_tokens
        shapes["image"] = size.image_width // size.image_heads, tokens * joined(batch, tokens)
    if size.has_text_blocks:
        together = 1 if size.text_causal else joined(batch, context_length)
        shapes["text"] = size.text_width // size.text_heads, context_length * together
    found = {tower: attention_kernel.misfit(*shape) for tower, shape in shapes.items()}
    if size.image_rope:
        found["image"] = "its queries and keys are rotated (image_rope)"
    for tower, normalised in (("image", size.image_qk_norm), ("text", size.text_qk_norm)):
        if normalised:
            found[tower] = f"its queries and keys are normalised ({tower}_qk_norm)"
    return {tower: why for tower, why in found.items() if why}


def joined(batch: int, length: int) -> int:
    """Returns how many sequences the kernel for TPUs takes as one: several where they are short.

    As few as fill it, of a batch that they divide on each device, and whole tiles of tokens.
    """
    if length >= attention_kernel.SHORTEST:
        return 1
    counts = (n for n in range(2, _MOST + 1) if batch % n == 0 and splits(batch // n))
    whole = (n for n in counts if n * length >= attention_kernel.SHORTEST and n * length % 8 == 0)
    return next(whole, 1)


def splits(batch: int) -> bool:
    """Tells whether each device of the mesh, if one is set, gets as many examples."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = math.prod(mesh.shape.get(axis, 1) for axis in sharding.BATCH[0])
    return batch % shards == 0


def attend_in_kernel(
    projected: attention_kernel.Projected,
    bias: Float[Array, "3 heads d"],
    mask: Bool[Array, "#batch 1 query key"] | None,
    length: int | None,
) -> Tokens:
    """Computes the same attention as `attend` and `attend_with_token` by the kernel for TPUs.

    Args:
      projected: queries, keys and values, split over the mesh by examples and heads.
      bias, length: see `attention_kernel.attend`.
      mask: see `attend`.

    Returns:
      [b, s, heads, d], or with a token a pair of this and [b, heads, d].
    """
    attend_ = partial(attention_kernel.attend, length=length)
    if set(sharding.AXES) <= set(jax.sharding.get_abstract_mesh().axis_names):
        examples = sharding.BATCH[0]
        spec = PartitionSpec(examples, None, "tensor")
        of_mask = PartitionSpec(examples if mask is not None and mask.shape[0] > 1 else None)
        attend_ = jax.shard_map(
            attend_,
            in_specs=(spec, PartitionSpec(None, "tensor"), of_mask),
            out_specs=PartitionSpec(examples, "tensor"),
            check_vma=False,  # a kernel does not tell over which axes its outputs vary
        )
    y = attend_(projected, bias, mask)
    sequence = y.sequence.transpose(0, 3, 1, 2)
    return sequence if y.token is None else (sequence, y.token)


def attend(
    heads: Heads,
    mask: Bool[Array, "#batch 1 query key"] | None = None,
    causal: bool = False,
    form: str = "xla",
) -> Float[Array, "batch query heads d"]:
    """Computes softmax attention of a sequence to itself, with float32 logits and statistics.

    Args:
      heads: [b, s, heads, d] each; queries may be fewer, [b, n, heads, d], where all see all.
      mask: True for the keys that each query sees; None: see `causal`.
      causal: without a mask, whether a query sees no later key.
      form: "cudnn" for NVIDIA's kernel; any other: what XLA makes of it.

    Returns:
      As many tokens as there are queries.
    """
    return jax.nn.dot_product_attention(
        *heads,
        mask=mask,
        is_causal=causal and mask is None,
        implementation="cudnn" if form == "cudnn" else "xla",
    )


def attend_with_token(
    sequence: Heads, token: Heads
) -> tuple[Float[Array, "batch query heads d"], Float[Array, "batch heads d"]]:
    """Computes attention for a sequence and one more token, all of which see each other.

    For sequences that fill the tiles of an accelerator (128 numbers by 8 or 16): with the token in
    the same array, 256 patches and a class token would take the time and memory of 384.

    Args:
      sequence: [b, s, heads, d] each.
      token: [b, heads, d] each.

    Returns:
      [b, s, heads, d] and [b, heads, d].
    """
    (queries, keys, values), (query, key, value) = sequence, token
    # A column of ones beside the values sums up the weights in the same product.
    ones = jnp.ones((*values.shape[:-1], 1), values.dtype)
    values = jnp.concatenate([values, ones], axis=-1)
    queries, query = (q * q.shape[-1] ** -0.5 for q in (queries, query))
    of_queries = _merge(
        _logits("bqhd,bkhd->bhqk", queries, keys),
        _logits("bqhd,bhd->bhq", queries, key),
        lambda weights: _sums("bhqk,bkhd->bqhd", weights, values),
        lambda weights: weights.swapaxes(1, 2)[..., None] * value[:, None],
        lambda weights: weights.swapaxes(1, 2)[..., None],
    )
    of_query = _merge(
        _logits("bhd,bkhd->bhk", query, keys),
        _logits("bhd,bhd->bh", query, key),
        lambda weights: _sums("bhk,bkhd->bhd", weights, values),
        lambda weights: weights[..., None] * value,
        lambda weights: weights[..., None],
    )
    return of_queries.astype(value.dtype), of_query.astype(value.dtype)


def _merge(
    logits: jax.Array,
    own_logit: jax.Array,
    weigh: Callable,
    weigh_own: Callable,
    weight_own: Callable,
) -> jax.Array:
    """Computes a softmax over the keys of the sequence (last in `logits`) and of the token."""
    highest = jax.lax.stop_gradient(jnp.maximum(logits.max(axis=-1), own_logit))
    weights, own = jnp.exp(logits - highest[..., None]), jnp.exp(own_logit - highest)
    summed = weigh(weights)
    return (summed[..., :-1] + weigh_own(own)) / (summed[..., -1:] + weight_own(own))


def _logits(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _sums(subscripts: str, weights: jax.Array, values: jax.Array) -> jax.Array:
    """Sums up values in float32, with weights rounded to their dtype."""
    weights = weights.astype(values.dtype)
    return jnp.einsum(subscripts, weights, values, preferred_element_type=jnp.float32)
