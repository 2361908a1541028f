"""The training step: a pure function of state and batch."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from clip_jax import losses, sharding
from clip_jax.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    net: nn.Module,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh | None,
    loss_method: str,
    max_logit_scale: float,
) -> tuple[TrainState, Metrics]:
    """One update on the global batch.

    Args:
      state: of the training.
      batch: "image" uint8 [B, h, w, 3] and "tokens" int32 [B, s], split over the mesh.
      net: a `clip_jax.models.CLIP`.
      tx: the optimiser.
      schedule: its learning rate, for the log.
      mesh: devices the batch is split over; None for one device.
      loss_method: see `losses.softmax_loss`.
      max_logit_scale: bound on the multiplier exp(logit_scale), kept after the update.

    Returns:
      The new state, and float32 scalars: loss, grad_norm (before clipping), param_norm,
      logit_scale (the multiplier), learning_rate.
    """

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        embeds, updated = net.apply(
            variables, batch["image"], batch["tokens"], train=True, mutable=["batch_stats"]
        )
        loss = losses.softmax_loss(*embeds, mesh=mesh, method=loss_method)
        return loss, updated.get("batch_stats", {})

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    logit_scale = jnp.minimum(params["logit_scale"], math.log(max_logit_scale))
    params = {**params, "logit_scale": logit_scale}
    metrics = {
        "loss": loss,
        "grad_norm": optax.tree.norm(grads),
        "param_norm": optax.tree.norm(params),
        "logit_scale": jnp.exp(logit_scale),
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
    }
    state = TrainState(state.step + 1, params, batch_stats, opt_state)
    return state, metrics


def compile_step(state: TrainState, batch: Any, *, mesh: Mesh, **settings) -> jax.stages.Compiled:
    """Compiles `train_step` for a mesh; the state passed to the result is donated.

    Args:
      state, batch: arrays or `ShapeDtypeStruct`s with shardings.
      mesh: of the run.
      **settings: the other arguments of `train_step`.

    Returns:
      The program, callable as step(state, batch) like `train_step`; it can also tell the memory
      and the operations it needs.
    """
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(
        partial(train_step, mesh=mesh, **settings),
        donate_argnums=0,
        out_shardings=(state_shardings, sharding.replicated(mesh)),
    )
    with jax.set_mesh(mesh):
        return step.lower(state, batch).compile()
