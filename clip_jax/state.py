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


def init_variables(net: nn.Module, seed: int) -> dict[str, Any]:
    """Parameters and BatchNorm statistics of a new model; to be jitted or eval_shaped."""
    size = net.size
    images = jnp.zeros((1, size.image_size, size.image_size, 3), jnp.uint8)
    tokens = jnp.zeros((1, size.context_length), jnp.int32)
    return {"batch_stats": {}, **net.init(jax.random.key(seed), images, tokens)}


def _start(variables: Any, tx: optax.GradientTransformation) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=tx.init(variables["params"]),
    )


def abstract_state(net: nn.Module, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, nothing allocated."""
    return _placed(jax.eval_shape(lambda: _start(init_variables(net, 0), tx)), mesh)


def abstract_variables(net: nn.Module, mesh: Mesh) -> dict[str, Any]:
    """The same for what inference needs, as `TrainState.variables`."""
    return _placed(jax.eval_shape(lambda: init_variables(net, 0)), mesh)


def _placed(shapes: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        sharding.tree_shardings(shapes, mesh),
    )


def init_state(
    net: nn.Module,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    variables: Any = None,
) -> TrainState:
    """The initial state, each device computing only its share; equal on every mesh.

    Args:
      net: a `clip_jax.models.CLIP`.
      tx: the optimiser.
      mesh: where the state lives.
      seed: of the random initialisation.
      variables: of a model to start from; None: random.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(net, tx, mesh))
    if variables is not None:
        return jax.jit(lambda v: _start(v, tx), out_shardings=shardings)(variables)
    return jax.jit(lambda: _start(init_variables(net, seed), tx), out_shardings=shardings)()


def count_params(params: Any) -> int:
    """Number of trainable values, of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
