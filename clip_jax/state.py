"""What training changes: one pytree, born sharded."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh

from clip_jax import sharding


class TrainState(struct.PyTreeNode):
    """Parameters and what the optimiser knows of them.

    Attributes:
      step: int32 [], steps taken.
      params: float32 pytree.
      batch_stats: running statistics of BatchNorm; empty for a ViT.
      opt_state: of the optimiser.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState

    @property
    def variables(self) -> dict[str, Any]:
        """What `net.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def make_init(net: nn.Module, tx: optax.GradientTransformation, seed: int):
    """A function of no arguments that makes the initial state; for `eval_shape` and `jit`."""
    size = net.size
    images = jnp.zeros((1, size.image_size, size.image_size, 3), jnp.uint8)
    tokens = jnp.zeros((1, size.context_length), jnp.int32)

    def init() -> TrainState:
        variables = net.init(jax.random.key(seed), images, tokens)
        params = variables["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=tx.init(params),
        )

    return init


def abstract_state(net: nn.Module, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, nothing allocated."""
    shapes = jax.eval_shape(make_init(net, tx, seed=0))
    shardings = sharding.tree_shardings(shapes, mesh)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings,
    )


def init_state(
    net: nn.Module, tx: optax.GradientTransformation, mesh: Mesh, seed: int
) -> TrainState:
    """The initial state, each device computing only its share; equal on every mesh."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(net, tx, mesh))
    return jax.jit(make_init(net, tx, seed), out_shardings=shardings)()


def count_params(params: Any) -> int:
    """Number of trainable values, of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
