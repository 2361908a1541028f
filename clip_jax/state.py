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
      ema: {"params": float32 moving average of the parameters}; None where the run keeps none.
    """

    step: Int[Array, ""]
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """The variables that `net.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def averaged_variables(self) -> dict[str, Any]:
        """The variables with the moving average of the parameters, placed as those are."""
        places = jax.tree.map(lambda leaf: leaf.sharding, self.params)
        return {**self.variables, "params": jax.device_put(self.ema["params"], places)}


def init_variables(net: nn.Module, seed: int) -> dict[str, Any]:
    """Initialises parameters and BatchNorm statistics; to be jitted or eval_shaped."""
    size = net.size
    images = jnp.zeros((1, size.image_size, size.image_size, 3), jnp.uint8)
    tokens = jnp.zeros((1, size.context_length), jnp.int32)
    return {"batch_stats": {}, **net.init(jax.random.key(seed), images, tokens)}


def _start(variables: Any, optimizer: optim.Optimizer) -> TrainState:
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=optim.to_bf16(params, optimizer.bf16_params),
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.rule.init(optimizer.factors.select(params)),
        # A copy: the step donates both.
        ema={"params": jax.tree.map(jnp.copy, params)} if optimizer.ema_decay else None,
    )


def abstract_state(
    net: nn.Module,
    optimizer: optim.Optimizer,
    mesh: Mesh,
    *,
    zero1: bool = False,
) -> TrainState:
    """Returns shapes, dtypes and shardings of the state, nothing allocated.

    Args:
      net: one of `clip_jax.models.MODULES`.
      optimizer: the optimiser.
      mesh: devices that will hold the state.
      zero1: split the optimiser's state over the data axis too.
    """
    shapes = jax.eval_shape(lambda: _start(init_variables(net, 0), optimizer))
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
    optimizer: optim.Optimizer,
    seed: int,
    *,
    variables: Any = None,
) -> TrainState:
    """Computes the initial state, on each device only its shards; equal on every mesh.

    Args:
      like: shapes and shardings, from `abstract_state`.
      net: one of `clip_jax.models.MODULES`.
      optimizer: the optimiser.
      seed: PRNG seed of the random initialisation.
      variables: a model's, to start from; None: random, as are those that are None in it.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)

    def start(variables):
        random = init_variables(net, seed)
        return _start(optim.merge(variables, random) if variables else random, optimizer)

    return jax.jit(start, out_shardings=shardings)(variables)


def count_params(params: Any) -> int:
    """Counts the trainable values of a pytree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
