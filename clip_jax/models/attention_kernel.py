"""Attention of whole sequences as one kernel for TPUs, forward and backward (Pallas).

All of a sequence is in VMEM at once: 50 to about 1,000 tokens need no blocks and no second pass. A
grid step computes some heads of one example. Within it:

- Sequences lie along the lanes and features along the sublanes, [d, s]. The projections write and
  read this layout at no cost, heads of any width that 8 divides fill it, and four of the five
  products of the backward pass need no transposition.
- Logits are transposed, [keys, queries], so that the maximum and the sum over the keys are taken
  across registers, and statistics are rows, which broadcast for free.
- A class token may stand apart. As a key it adds a row of logits, as a query a row of its own.
  Among 256 patches it would make 384 lanes of the 256.
- The heads are interleaved by hand: the compiler does not start the products of the next head
  before the exponentials of this one are done.

Products take the compute dtype and sum in float32. Softmax and its derivative are float32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

_NEVER = -1e30  # logit of a key that a query does not see; its weight is exactly 0
_VMEM = 64 * 2**20  # bytes
# The widest head and the longest sequence that the compiler has been seen to fit.
_WIDEST, _LONGEST = 128, 1152
# Below this a sequence fills less than half of the 128 lanes. By the planner the 50 tokens of
# ViT-B/32 then take 1.3 times as long as in XLA's form, projections included.
SHORTEST = 65


def misfit(d: int, length: int) -> str:
    """Tells why the kernel does not fit sequences, or does not pay; "" if it does.

    Args:
      d: width of a head.
      length: tokens, without one that stands apart.
    """
    if d % 8 or d > _WIDEST:
        return f"heads {d} wide are not a multiple of 8 up to {_WIDEST}"
    if length > _LONGEST:
        return f"{length:,} tokens are more than {_LONGEST:,}"
    if length < SHORTEST:
        return f"{length} tokens would fill half of the chip's lanes, or less"
    return ""


class Projected(NamedTuple):
    """Queries, keys and values, in this order.

    Attributes:
      sequence: those of the sequence.
      token: those of one more token per example, or None.
    """

    sequence: Any  # [b, 3, heads, d, s]
    token: Any  # [b, 3, heads, d]


class Attended(NamedTuple):
    """Outputs of attention, or their gradients, in the same layout."""

    sequence: Any  # [b, heads, d, s]
    token: Any  # [b, heads, d], or None


class _Statistics(NamedTuple):
    """The logarithms of the sums of exponentials, float32; the token's fill a row of lanes."""

    sequence: Any  # [b, heads, s]
    token: Any  # [b, heads, 128], or None


def attend(
    projected: Projected,
    bias: Float[Array, "3 heads d"],
    mask: Bool[Array, "#batch 1 query key"] | None = None,
    length: int | None = None,
) -> Attended:
    """Computes softmax attention of each example's tokens to each other.

    Args:
      projected: queries, keys and values.
      bias: what has been added to those of the sequence, as a constant: its gradient is computed
        here, since XLA takes ten times as long to sum along the lanes.
      mask: True for the keys that each query sees, at least one; None: all. Not with a token.
      length: tokens of a sequence before its padding, whose results and gradients are 0; None: all.
        Not with a mask.
    """
    if mask is not None:
        mask = mask[:, 0].swapaxes(1, 2).astype(jnp.int8)
    return _attend(projected, bias, mask, length or projected.sequence.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(projected: Projected, bias: jax.Array, mask: jax.Array | None, length: int) -> Attended:
    return _forward(projected, bias, mask, length)[0]


def _forward(
    projected: Projected, bias: jax.Array, mask: jax.Array | None, length: int
) -> tuple[Attended, Any]:
    del bias
    b, _, h, d, s = projected.sequence.shape
    token, dtype = projected.token is not None, projected.sequence.dtype
    shape, f32 = jax.ShapeDtypeStruct, jnp.float32
    outputs = (
        Attended(shape((b, h, d, s), dtype), shape((b, h, d), dtype) if token else None),
        _Statistics(shape((b, h, s), f32), shape((b, h, 128), f32) if token else None),
    )
    found = _call(_forward_kernel, "attention_forward", length, mask, (projected,), outputs)
    # Where rematerialisation keeps these, the backward pass does not run this kernel again.
    out, statistics = jax.tree.map(lambda x: checkpoint_name(x, "attention"), found)
    return out, (projected, mask, out, statistics)


def _backward(length: int, residuals: Any, gradient: Attended) -> tuple[Projected, jax.Array, None]:
    projected, mask, *others = residuals
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), projected)
    # The gradient of the bias, for each example.
    sums = Projected(jax.ShapeDtypeStruct(projected.sequence.shape[:-1], jnp.float32), None)
    inputs = (projected, *others, gradient)
    found, sums = _call(
        _backward_kernel, "attention_backward", length, mask, inputs, (shapes, sums)
    )
    return found, sums.sequence.sum(axis=0).astype(projected.sequence.dtype), None


_attend.defvjp(_forward, _backward)


def _call(
    kernel: Callable,
    name: str,
    length: int,
    mask: jax.Array | None,
    inputs: tuple,
    outputs: tuple,
) -> tuple:
    """Calls a kernel with trees of arrays, a group of heads of one example at a time."""
    b, _, heads, d, _ = inputs[0].sequence.shape
    group = 8 if heads % 8 == 0 else heads  # as the tiles of what has heads along the sublanes

    def blocks(tree: Any) -> Any:
        axis = 2 if isinstance(tree, Projected) else 1  # of the heads

        def block(x) -> pl.BlockSpec:
            shape = (1, *x.shape[1:axis], group, *x.shape[axis + 1 :])
            return pl.BlockSpec(
                shape, lambda i, j: (i, *(0,) * (axis - 1), j, *(0,) * (x.ndim - axis - 1))
            )

        return jax.tree.map(block, tree)

    mask_block = None
    if mask is not None:
        own = int(mask.shape[0] > 1)
        mask_block = pl.BlockSpec((1, *mask.shape[1:]), lambda i, j: (i * own, 0, 0))
    return pl.pallas_call(
        partial(kernel, d**-0.5, length),
        name=name,
        grid=(b, heads // group),
        in_specs=[mask_block, *map(blocks, inputs)],
        out_specs=tuple(map(blocks, outputs)),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_VMEM
        ),
    )(mask, *inputs)


def _forward_kernel(scale, length, mask, projected, out, statistics) -> None:
    """Writes outputs and statistics of a group of heads; arguments are references to blocks."""
    sequence, token = projected
    heads, dtype = sequence.shape[2], sequence.dtype
    seen = None if mask is None else mask[0] != 0

    def logits(i):
        q, k = (sequence[0, part, i, :, :length] for part in range(2))
        x = _visible(_dot(k.T, q, 1, 0) * scale, seen)  # [keys, queries]
        if token is None:
            return (x,)
        q_token, k_token = token[0, 0, i : i + 1], token[0, 1, i : i + 1]
        return x, _dot(k_token, q, 1, 0) * scale, _dot(q_token, k, 1, 0) * scale

    def weights(i, x, of_key=None, of_query=None):
        highest = x.max(axis=0, keepdims=True)
        if of_key is not None:
            highest = jnp.maximum(highest, of_key)
            of_key = jnp.exp(of_key - highest)
        return highest, jnp.exp(x - highest), of_key, of_query

    def weigh(i, highest, p, of_key, of_query):
        v = sequence[0, 2, i, :, :length]
        total = p.sum(axis=0, keepdims=True)
        y = _dot(v, p.astype(dtype), 1, 0)  # [d, queries]
        if of_key is not None:
            total += of_key
            y += values[:, i : i + 1] * of_key
        _write(out.sequence, (0, i), (y / total).astype(dtype))
        statistics.sequence[0, i : i + 1, :length] = highest + jnp.log(total)
        return (of_query,)

    if token is not None:
        values = token[0, 2].astype(jnp.float32).T  # a column for each head
    rows = _interleave(heads, logits, weights, weigh)
    if token is None:
        return
    # The token's own query, for all heads at once.
    q, k, v = token[0].astype(jnp.float32)
    x, own = jnp.concatenate([row for (row,) in rows]), _sums(q * k) * scale
    highest = jnp.maximum(x.max(axis=1, keepdims=True), own)
    p, own = jnp.exp(x - highest), jnp.exp(own - highest)
    total = _sums(p) + own
    rounded = p.astype(dtype)
    y = [_dot(rounded[i : i + 1], sequence[0, 2, i], 1, 1) for i in range(heads)]
    out.token[0] = ((jnp.concatenate(y) + own * v) / total).astype(dtype)
    lanes = statistics.token.shape[1:]
    statistics.token[0] = jnp.broadcast_to(highest + jnp.log(total), lanes)


def _backward_kernel(
    scale, length, mask, projected, out, statistics, gradient, result, sums
) -> None:
    """Writes the gradients of a group of heads; arguments are references to blocks."""
    sequence, token = projected
    heads, dtype = sequence.shape[2], sequence.dtype
    f32 = jnp.float32
    ones = jnp.ones((1, length), dtype)
    seen = None if mask is None else mask[0] != 0
    own_parts: tuple = ()  # gradients of what the token sees of itself
    if token is not None:
        q_token, k_token, v_token = token[0].astype(f32)
        g_token = gradient.token[0].astype(f32)
        columns = [part.T for part in (q_token, k_token, g_token)]
        statistic = statistics.token[0, :, :1]
        mean = _sums(g_token * out.token[0].astype(f32))
        own = jnp.exp(_sums(q_token * k_token) * scale - statistic)
        own_gradient = own * (_sums(g_token * v_token) - mean) * scale
        own_parts = own_gradient * k_token, own_gradient * q_token, own * g_token

    def products(i):
        q, k, v = (sequence[0, part, i, :, :length] for part in range(3))
        g, y = (part.sequence[0, i, :, :length] for part in (gradient, out))
        own_mean = (g.astype(f32) * y.astype(f32)).sum(axis=0, keepdims=True)
        whole = _visible(_dot(k.T, q, 1, 0) * scale, seen), _dot(v.T, g, 1, 0), own_mean
        if token is None:
            return *whole, ()
        a, b, c = (token[0, part, i : i + 1] for part in range(3))
        of_token = _dot(b, q, 1, 0), _dot(c, g, 1, 0), _dot(a, k, 1, 0)
        return *whole, (*of_token, _dot(gradient.token[0, i : i + 1], v, 1, 0))

    def weights(i, x, dp, own_mean, of_token):
        statistic_ = statistics.sequence[0, i : i + 1, :length]
        p = jnp.exp(x - statistic_)
        dx = (p * (dp - own_mean) * scale).astype(dtype)
        if of_token:
            x_key, dp_key, x_query, dp_query = of_token
            p_key = jnp.exp(x_key * scale - statistic_)
            p_query = jnp.exp(x_query * scale - statistic[i : i + 1])
            of_token = (
                p_key,
                p_key * (dp_key - own_mean) * scale,
                p_query,
                p_query * (dp_query - mean[i : i + 1]) * scale,
            )
        return p.astype(dtype), dx, of_token

    def gradients(i, p, dx, of_token):
        q, k = (sequence[0, part, i, :, :length] for part in range(2))
        g = gradient.sequence[0, i, :, :length]
        found = _dot(k, dx, 1, 0), _dot(q, dx, 1, 1), _dot(g, p, 1, 1)
        rows = ()
        if of_token:
            p_key, dx_key, p_query, dx_query = of_token
            added = dx_key, dx_query, p_query
            q_column, k_column, g_column = (part[:, i : i + 1] for part in columns)
            outer = (c * row for c, row in zip((k_column, q_column, g_column), added))
            found = tuple(map(jnp.add, found, outer))
            rows = (
                _dot(dx_query.astype(dtype), k, 1, 1),
                _dot(dx_key.astype(dtype), q, 1, 1),
                _dot(p_key.astype(dtype), g, 1, 1),
            )
        for part, value in enumerate(found):
            value = value.astype(dtype)
            _write(result.sequence, (0, part, i), value)
            sums.sequence[0, part, i : i + 1] = _dot(ones, value, 1, 1)  # by the matrix unit
        return rows

    rows = _interleave(heads, products, weights, gradients)
    if token is None:
        return
    for part, (of_heads, own_part) in enumerate(zip(zip(*rows), own_parts)):
        result.token[0, part] = (jnp.concatenate(of_heads) + own_part).astype(dtype)


def _write(to: Any, index: tuple[int, ...], value: jax.Array) -> None:
    """Writes what was found for a sequence, [d, length], and zeros for its padding."""
    length = value.shape[-1]
    to[*index, :, :length] = value
    if padding := to.shape[-1] - length:
        to[*index, :, length:] = jnp.zeros((len(value), padding), value.dtype)


def _interleave(heads: int, *stages: Callable) -> list[tuple]:
    """Runs stages for each head, each a stage behind the next head; returns the last's results."""
    found: list[tuple] = [()] * heads
    for turn in range(heads + len(stages) - 1):
        for number, stage in enumerate(stages):
            head = turn - number
            if 0 <= head < heads:
                found[head] = stage(head, *found[head])
    return found


def _visible(logits: jax.Array, seen: jax.Array | None) -> jax.Array:
    return logits if seen is None else jnp.where(seen, logits, _NEVER)


def _sums(x: jax.Array) -> jax.Array:
    return x.sum(axis=1, keepdims=True)


def _dot(a: jax.Array, b: jax.Array, of_a: int, of_b: int) -> jax.Array:
    """Contracts a dimension of each, and sums in float32."""
    dims = (((of_a,), (of_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
