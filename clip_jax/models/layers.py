"""Parts common to the towers: initialisers, activations, norms, pooling, rematerialisation."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from clip_jax import choices
from clip_jax.errors import UserError

Dtype = Any
Init = nn.initializers.Initializer

# PyTorch's default for the weight of a Linear or Conv2d, which the published ViT blocks begin at.
torch_default_init: Init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_default_bias_init(fan_in: int) -> Init:
    """Returns PyTorch's default for the bias of a Linear: uniform up to fan_in^-1/2 either way.

    The published code leaves the biases of MLPs and of the ResNets' attention pooling there; those
    of its attention begin at zero, by PyTorch's MultiheadAttention.
    """
    bound = fan_in**-0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


@partial(jax.checkpoint, prevent_cse=False)  # else each layer keeps x, its sigmoid and the product
def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes the sigmoid approximation of GELU that OpenAI's weights were trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


@partial(jax.checkpoint, prevent_cse=False)
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes x times the probability that a standard normal variable is below x."""
    return jax.nn.gelu(x, approximate=False)


@partial(jax.checkpoint, prevent_cse=False)
def gelu_tanh(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes the tanh approximation of GELU."""
    return jax.nn.gelu(x, approximate=True)


@partial(jax.checkpoint, prevent_cse=False)
def swiglu(x: Float[Array, "*shape 2 hidden"]) -> Float[Array, "*shape hidden"]:
    """Multiplies the second half of the units by the SiLU of the first (Shazeer 2020)."""
    return jax.nn.silu(x[..., 0, :]) * x[..., 1, :]


# By the names of `Size.activation`.
ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu, "gelu_tanh": gelu_tanh, "swiglu": swiglu}


def units(mlp: int, activation: str) -> int | tuple[int, int]:
    """Returns the outputs of an MLP's first product: a gate doubles them.

    The two halves are a dimension of their own, so that the tensor axis splits both alike.
    """
    return (2, mlp) if activation in choices.GATED else mlp


def make_norm(kind: str, eps: float, dtype: Dtype, name: str | None) -> nn.Module:
    """Returns a LayerNorm or an RMSNorm, with float32 statistics whatever the compute dtype.

    Args:
      kind: a name in `choices.NORMS`.
      eps: addition to the variance.
      dtype: dtype of the results.
      name: name of the module; None: that of its attribute.
    """
    make = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[kind]
    return make(epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


def mean(x: Float[Array, "batch tokens width"]) -> Float[Array, "batch width"]:
    """Averages tokens, in float32 whatever their dtype."""
    return jnp.mean(x, axis=1, dtype=jnp.float32).astype(x.dtype)


class MapHead(nn.Module):
    """Attention pooling (Lee et al. 2019): a learned probe is the one query over all tokens.

    Attributes:
      mlp: hidden units of the MLP behind it.
      activation: their activation, a name in `ACTIVATIONS`.
      norm: kind of the norm before the MLP; see `make_norm`.
      norm_eps: its addition to the variance.
    """

    heads: int
    mlp: int
    activation: str
    norm: str
    norm_eps: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch width"]:
        width = x.shape[-1]
        uniform = nn.initializers.xavier_uniform()
        probe = self.param("probe", nn.initializers.normal(width**-0.5), (width,)).astype(x.dtype)
        probe = jnp.broadcast_to(probe, (x.shape[0], 1, width))
        dense = partial(nn.DenseGeneral, dtype=self.dtype, kernel_init=uniform)
        project = partial(dense, (self.heads, width // self.heads))
        y = jax.nn.dot_product_attention(
            project(name="query")(probe), project(name="key")(x), project(name="value")(x)
        )
        x = dense(width, axis=(-2, -1), name="attn_out")(y)[:, 0]
        y = make_norm(self.norm, self.norm_eps, self.dtype, "ln")(x)
        y = dense(units(self.mlp, self.activation), name="mlp_in")(y)
        return x + dense(width, name="mlp_out")(ACTIVATIONS[self.activation](y))


# ---- Rematerialisation: what the backward pass computes again, by config.model.remat -----------

# Activations of a transformer block that may be kept, each with those before it, from the one that
# saves most time for its bytes; bfloat16 numbers per token and channel: 1, 3, 1 and, in an MLP of
# four times the width, 4. What none of them holds takes little time to compute again.
NAMED = ("attention", "qkv", "residual", "mlp")


def named(x: Any, name: str) -> Any:
    """Gives activations, an array or a tree of them, a name in `NAMED`."""
    assert name in NAMED
    return jax.tree.map(lambda part: checkpoint_name(part, name), x)


# Activations kept for the backward pass. Dots are convolutions as well, except under
# "no_batch_dims", which covers plain matrix products only.
POLICIES: Mapping[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    **{
        name: jax.checkpoint_policies.save_only_these_names(*NAMED[: number + 1])
        for number, name in enumerate(NAMED)
    },
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "everything_saveable": jax.checkpoint_policies.everything_saveable,
}

Part = TypeVar("Part", bound=Callable)


def remat_layer(layer: Callable, remat: str, scanned: bool) -> Callable:
    """Wraps a layer so that the backward pass recomputes activations as `remat` says.

    Args:
      layer: function of (carry, params).
      remat: "none" keeps all activations, "full" only the layer's input; one of `NAMED` that and
        all before it; other names are those of `POLICIES`.
      scanned: whether the layer is the body of a scan.

    Raises:
      UserError: unknown name.
    """
    if remat == "none":
        return layer
    # Unrolled, a compiler would find what is computed twice, and keep it. (XLA's for the CPU still
    # does; the planner's tests see that the one for TPUs does not.)
    return jax.checkpoint(layer, policy=_policy(remat), prevent_cse=not scanned)


def remat_part(part: Part, remat: str) -> Part:
    """Wraps a class of modules, or a method of one, called as (x, train), in the same way.

    Parameters and statistics keep their names and values: statistics move once, in the forward
    pass.
    """
    if remat == "none":
        return part
    return nn.remat(part, policy=_policy(remat), static_argnums=2)


def _policy(remat: str) -> Any:
    if remat not in POLICIES:
        known = ", ".join(["none", *sorted(POLICIES)])
        raise UserError(f"Unknown rematerialisation {remat!r}: model.remat is one of {known}.")
    return POLICIES[remat]
