"""LayerNorm at the head of a residual branch, by XLA or as one kernel for TPUs (Pallas); RMSNorm.

The kernel reads and writes each array once, forward and backward. XLA takes a pass each for the
mean, for the variance and for the result, or it computes them within the matrix products beside,
which then wait for them.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from clip_jax import sharding
from clip_jax.models.attention import Tokens, splits
from clip_jax.models.layers import Dtype

_ROWS = 16  # tokens at a time: the sublanes of a tile of bfloat16
_UNROLLED = 4  # so often, or the compiler waits for the sums of each
_BLOCK = 2**18  # numbers of an array, about; two blocks of each of up to four arrays are in VMEM
# Bytes of VMEM: at least, and of each number of a block: two blocks of four bfloat16 arrays, and
# some more.
_VMEM, _VMEM_EACH = 12 * 2**20, 20
_LARGEST = 2**21  # numbers of an example; a larger one would not leave much of 64 MiB

Row = Float[Array, " w"]
# Biases that are added as constants, since the kernel has their gradients at hand: one within the
# tokens that are normalised, and one of what is later added to them.
Constants = tuple[Row, Row]


class LayerNorm(nn.Module):
    """Normalises each token to mean 0 and variance 1, with float32 statistics, then maps affinely.

    Attributes:
      eps: addition to the variance.
      dtype: dtype of the results.
      kernel: whether sequences that fit it go through the kernel. A token apart does not.
      rms: RMSNorm instead, without mean and bias (Zhang & Sennrich 2019), and without the kernel.
    """

    eps: float
    dtype: Dtype
    kernel: bool
    rms: bool = False

    @nn.compact
    def __call__(self, x: Tokens, constants: Constants | None = None) -> tuple[Tokens, Tokens]:
        """Normalises tokens.

        Args:
          x: tokens, [b, s, w] or with a token apart.
          constants: biases to compute gradients for.

        Returns:
          The normalised tokens, and `x` for the way past the branch.
        """
        width = jax.tree.leaves(x)[0].shape[-1]
        scale = self.param("scale", nn.initializers.ones, (width,))
        bias = None if self.rms else self.param("bias", nn.initializers.zeros, (width,))

        def normalize(part: jax.Array) -> tuple[jax.Array, jax.Array]:
            if self.kernel and bias is not None and _fits(part):
                return _in_kernel(part, scale, bias, constants, self.eps)
            if constants is not None:
                part = _learnt(part, constants[0])
            centred, inverse = _centre(part.astype(jnp.float32), self.eps, not self.rms)
            y = centred * (inverse * scale)
            y = (y if bias is None else y + bias).astype(self.dtype)
            return y, part if constants is None else _learnt(part, constants[1])

        if not isinstance(x, tuple):
            return normalize(x)
        (y, x), (y_token, token) = map(normalize, x)
        return (y, y_token), (x, token)


def _fits(x: jax.Array) -> bool:
    if x.ndim != 3:
        return False
    b, s, w = x.shape
    return s >= _ROWS and w % 128 == 0 and s * w <= _LARGEST and splits(b)


def _centre(
    x: Float[Array, "*n w"], eps: float, centre: bool = True
) -> tuple[Float[Array, "*n w"], jax.Array]:
    """Returns tokens less their means, and the inverses of their standard deviations, [*n, 1]."""
    if centre:
        x = x - x.mean(axis=-1, keepdims=True)
    return x, jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + eps)


@jax.custom_vjp
def _learnt(x: Float[Array, "*n w"], constant: Row) -> Float[Array, "*n w"]:
    """Returns `x`, and gives a constant within it the gradient of a bias."""
    del constant
    return x


_learnt.defvjp(
    lambda x, constant: (x, constant),
    lambda constant, g: (
        g,
        g.sum(axis=range(g.ndim - 1), dtype=jnp.float32).astype(constant.dtype),
    ),
)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _in_kernel(
    x: Float[Array, "b s w"], scale: Row, bias: Row, constants: Constants | None, eps: float
) -> tuple[Float[Array, "b s w"], Float[Array, "b s w"]]:
    return _forward(x, scale, bias, constants, eps)[0]


def _forward(x, scale, bias, constants, eps):
    (y,) = _call(partial(_forward_kernel, eps), "layer_norm_forward", [x], [scale, bias], sums=0)
    return (y, x), (x, scale, bias, constants)


def _backward(eps, residuals, gradients):
    x, scale, *biases = residuals
    kernel = partial(_backward_kernel, eps)
    sums = 2 + 2 * (biases[1] is not None)
    of_x, *sums = _call(kernel, "layer_norm_backward", [x, *gradients], [scale], sums)
    rows, tree = jax.tree.flatten((scale, *biases))
    sums = [each.sum(axis=(0, 1)).astype(row.dtype) for each, row in zip(sums, rows)]
    return of_x, *tree.unflatten(sums)


_in_kernel.defvjp(_forward, _backward)


def _call(
    kernel: Callable, name: str, arrays: list[jax.Array], rows: list[jax.Array], sums: int
) -> tuple[jax.Array, ...]:
    """Calls a kernel with arrays [b, s, w] and rows [w], some examples at a time.

    Returns:
      An array like those, and `sums` of parts of the tokens, float32 [parts, 8, w].
    """

    def call(arrays: list[jax.Array], rows: list[jax.Array]) -> tuple[jax.Array, ...]:
        b, s, w = arrays[0].shape
        examples = max(n for n in range(1, b + 1) if b % n == 0 and (n == 1 or n * s * w <= _BLOCK))
        parts = b // examples
        block = pl.BlockSpec((examples, s, w), lambda i: (i, 0, 0))
        row = pl.BlockSpec((1, w), lambda i: (0, 0))
        of_sum = pl.BlockSpec((1, 8, w), lambda i: (i, 0, 0))
        shape = jax.ShapeDtypeStruct
        return pl.pallas_call(
            kernel,
            name=name,
            grid=(parts,),
            in_specs=[block] * len(arrays) + [row] * len(rows),
            out_specs=(block, *[of_sum] * sums),
            out_shape=(
                shape((b, s, w), arrays[0].dtype),
                *[shape((parts, 8, w), jnp.float32)] * sums,
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",),
                vmem_limit_bytes=max(_VMEM, _VMEM_EACH * examples * s * w),
            ),
        )(*arrays, *(row.reshape(1, w).astype(jnp.float32) for row in rows))

    if set(sharding.AXES) <= set(jax.sharding.get_abstract_mesh().axis_names):
        examples = PartitionSpec(sharding.BATCH[0])
        call = jax.shard_map(
            call,
            in_specs=(examples, PartitionSpec()),
            out_specs=examples,
            check_vma=False,  # a kernel does not tell over which axes its outputs vary
        )
    return call(arrays, rows)


def _forward_kernel(eps, x, scale, bias, y) -> None:
    """Writes the result for a block; arguments are references to blocks."""
    scale_, bias_ = scale[...], bias[...]

    def tokens(example, rows, carry):
        centred, inverse = _centre(x[example, rows].astype(jnp.float32), eps)
        y[example, rows] = (centred * inverse * scale_ + bias_).astype(y.dtype)
        return carry

    _each(x.shape, tokens, ())


def _backward_kernel(eps, x, gradient, past, scale, of_x, *sums) -> None:
    """Writes the gradients for a block; arguments are references to blocks."""
    scale_ = scale[...]

    def tokens(example, rows, carry):
        centred, inverse = _centre(x[example, rows].astype(jnp.float32), eps)
        z, g = centred * inverse, gradient[example, rows].astype(jnp.float32)
        gz, gs, other = g * z, g * scale_, past[example, rows].astype(jnp.float32)
        along = (gs * z).mean(axis=1, keepdims=True)
        found = inverse * (gs - gs.mean(axis=1, keepdims=True) - z * along) + other
        of_x[example, rows] = found.astype(of_x.dtype)
        # Gradients of scale and bias, of a constant within x, and of one of what is added to it.
        parts = (gz, g, found, other)[: len(sums)]
        return [total + _fold(part) for total, part in zip(carry, parts)]

    zeros = jnp.zeros(sums[0].shape[1:], jnp.float32)
    for to, total in zip(sums, _each(x.shape, tokens, [zeros] * len(sums))):
        to[0] = total


def _each(shape: tuple[int, ...], function: Callable, carry):
    """Calls function(example, slice of its tokens, carry) for all tokens of a block."""
    examples, length, _ = shape
    whole, rest = divmod(length, _ROWS)

    def rows(turn, carry):
        start = pl.multiple_of(jax.lax.rem(turn, whole) * _ROWS, _ROWS)
        return function(jax.lax.div(turn, whole), pl.ds(start, _ROWS), carry)

    def last(example, carry):
        return function(example, pl.ds(whole * _ROWS, rest), carry)

    carry = jax.lax.fori_loop(0, examples * whole, rows, carry, unroll=_UNROLLED)
    return jax.lax.fori_loop(0, examples, last, carry) if rest else carry


def _fold(x: Float[Array, "n w"]) -> Float[Array, "8 w"]:
    """Sums up every eighth row: whole registers, and nothing within one."""
    x = jnp.pad(x, ((0, -len(x) % 8), (0, 0)))
    return x.reshape(-1, 8, x.shape[1]).sum(axis=0)
