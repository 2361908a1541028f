"""The training state: one pytree, initialised sharded."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Int

from clip_jax import optim, sharding


class TrainState(struct.PyTreeNode):
    """Parameters and optimiser state.

    Attributes:
      step: int32, steps taken.
      params: float32 pytree; bfloat16 where optim.bf16_params says so.
      batch_stats: running statistics of BatchNorm; empty for a ViT.
      opt_state: state of the optimiser, float32; moments as optim.moment_dtype says.
    """

    step: Int[Array, ""]
    params: Any
    batch_stats: Any
    opt_state: optax.OptState

    @property
    def variables(self) -> dict[str, Any]:
        """The variables that `net.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def init_variables(net: nn.Module, seed: int) -> dict[str, Any]:
    """Initialises parameters and BatchNorm statistics; to be jitted or eval_shaped."""
    size = net.size
    images = jnp.zeros((1, size.image_size, size.image_size, 3), jnp.uint8)
    tokens = jnp.zeros((1, size.context_length), jnp.int32)
    return {"batch_stats": {}, **net.init(jax.random.key(seed), images, tokens)}


def _start(
    variables: Any, tx: optax.GradientTransformation, factors: optim.Factors, bf16_params: str
) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=optim.to_bf16(variables["params"], bf16_params),
        batch_stats=variables["batch_stats"],
        opt_state=tx.init(factors.select(variables["params"])),
    )


def abstract_state(
    net: nn.Module,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    factors: optim.Factors = optim.ALL,
    *,
    zero1: bool = False,
    bf16_params: str = "",
) -> TrainState:
    """Returns shapes, dtypes and shardings of the state, nothing allocated.

    Args:
      net: one of `clip_jax.models.MODULES`.
      tx: the optimiser.
      mesh: devices that will hold the state.
      factors: which parameters learn; the optimiser has a state of these only.
      zero1: split the optimiser's state over the data axis too.
      bf16_params: see `optim.to_bf16`.
    """
    shapes = jax.eval_shape(lambda: _start(init_variables(net, 0), tx, factors, bf16_params))
    return _placed(shapes, mesh, zero1)


def abstract_variables(net: nn.Module, mesh: Mesh) -> dict[str, Any]:
    """Returns those of the variables alone, which inference needs."""
    return _placed(jax.eval_shape(lambda: init_variables(net, 0)), mesh)


def _placed(shapes: Any, mesh: Mesh, zero1: bool = False) -> Any:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        sharding.tree_shardings(shapes, mesh, zero1),
    )


def init_state(
    like: TrainState,
    net: nn.Module,
    tx: optax.GradientTransformation,
    seed: int,
    factors: optim.Factors = optim.ALL,
    *,
    bf16_params: str = "",
    variables: Any = None,
) -> TrainState:
    """Computes the initial state, on each device only its shards; equal on every mesh.

    Args:
      like: shapes and shardings, from `abstract_state`.
      net: one of `clip_jax.models.MODULES`.
      tx: the optimiser.
      seed: PRNG seed of the random initialisation.
      factors: as for `abstract_state`.
      bf16_params: see `optim.to_bf16`.
      variables: a model's, to start from; None: random.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)

    def start(variables):
        return _start(variables or init_variables(net, seed), tx, factors, bf16_params)

    return jax.jit(start, out_shardings=shardings)(variables)


def count_params(params: Any) -> int:
    """Counts the trainable values of a pytree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
