"""The training step: a pure function of state and batch."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec

from clip_jax import optim, sharding
from clip_jax.state import TrainState
from clip_jax.stochastic_rounding import to_float32

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# Of a part of the batch: what the model returns, and new BatchNorm statistics.
Embed = Callable[[Any, Batch], tuple[tuple[jax.Array, ...], Any]]


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    net: nn.Module,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    loss_fn: Callable[..., jax.Array],
    augment: Callable[[jax.Array, jax.Array], jax.Array],
    accum_steps: int,
    zero1: bool,
    seed: int,
    max_logit_scale: float,
) -> tuple[TrainState, Metrics]:
    """One update on the global batch.

    Args:
      state: of the training.
      batch: "image" uint8 [B, h, w, 3] and "tokens" int32 [B, s], split over the mesh.
      net: one of `clip_jax.models.MODULES`.
      tx: the optimiser.
      schedule: its learning rate, for the log.
      loss_fn: of what the model returns; see `program.OBJECTIVES`.
      augment: of the images and a key of this step; see `augment.augment` and `views.two_views`.
      accum_steps: micro-batches that the towers see one after the other; the loss is that of the
        whole batch either way.
      zero1: the optimiser's state is split over the data axis; see `sharding.tree_shardings`.
      seed: of everything random, folded by step and by the example's place in the batch.
      max_logit_scale: bound on the multiplier exp(logit_scale), kept after the update.

    Returns:
      The new state, and float32 scalars: loss, grad_norm (before clipping), param_norm,
      learning_rate, and, where the model has one, logit_scale (the multiplier).
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    dropout, rounding, colours = jax.random.split(key, 3)

    def embed(params, part):
        outputs, updated = net.apply(
            {"params": params, "batch_stats": state.batch_stats},
            part["image"],
            part["tokens"],
            train=True,
            rows=part["row"],
            rngs={"dropout": dropout},
            mutable=["batch_stats"],
        )
        return outputs, updated.get("batch_stats", {})

    images = augment(batch["image"], colours)
    batch = {**batch, "image": images, "row": jnp.arange(images.shape[0])}
    gradients = _gradients if accum_steps == 1 else partial(_accumulated, accum_steps)
    loss, batch_stats, grads = gradients(embed, loss_fn, state.params, batch)
    # From here on each device works on its share alone, which under ZeRO is smaller than what it
    # holds of the parameters.
    share = partial(sharding.constrain_update, zero1=zero1)
    grads = share(to_float32(grads))
    updates, opt_state = tx.update(grads, state.opt_state, share(to_float32(state.params)))
    params: Any = share(optim.apply_updates(share(state.params), updates, rounding))
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    if "logit_scale" in params:
        logit_scale = jnp.minimum(params["logit_scale"], math.log(max_logit_scale))
        params = {**params, "logit_scale": logit_scale}
        metrics["logit_scale"] = jnp.exp(logit_scale)
    metrics["param_norm"] = optax.tree.norm(to_float32(params))
    metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
    state = TrainState(state.step + 1, params, batch_stats, opt_state)
    return state, metrics


def _gradients(embed: Embed, loss_fn: Callable, params: Any, batch: Batch):
    """Loss, BatchNorm statistics and gradients, of the whole batch at once."""

    def loss(params):
        outputs, batch_stats = embed(params, batch)
        return loss_fn(*outputs), batch_stats

    (value, batch_stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return value, batch_stats, grads


def _accumulated(count: int, embed: Embed, loss_fn: Callable, params: Any, batch: Batch):
    """The same with the activations of one micro-batch alive at a time.

    GradCache (Gao et al. 2021, arXiv:2101.06983).

    All micro-batches are embedded; the loss of all embeddings gives the gradient of each; then
    every micro-batch is embedded once more, to carry its share of that gradient to the parameters.
    Of what the model returns, scalars are parameters, the same in every micro-batch; all else has
    the batch as its first dimension. BatchNorm normalises by micro-batch, and its running
    statistics move once, by their mean.
    """
    parts = jax.tree.map(partial(_split, count), batch)
    _, (outputs, batch_stats) = jax.lax.scan(lambda _, part: (_, embed(params, part)), None, parts)
    outputs = tuple(_join(x) if x.ndim > 1 else x[0] for x in outputs)
    argnums = tuple(range(len(outputs)))
    value, gradients = jax.value_and_grad(loss_fn, argnums)(*outputs)
    d_outputs = tuple(
        _split(count, x) if x.ndim else jnp.broadcast_to(x / count, count) for x in gradients
    )

    def replay(grads, part_and_gradient):
        part, d_outputs = part_and_gradient
        _, pull_back, _ = jax.vjp(lambda p: embed(p, part), params, has_aux=True)
        return jax.tree.map(jnp.add, grads, to_float32(pull_back(d_outputs)[0])), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    grads, _ = jax.lax.scan(replay, zeros, (parts, d_outputs))
    return value, jax.tree.map(lambda x: x.mean(axis=0), batch_stats), grads


def _split(count: int, x: jax.Array) -> jax.Array:
    """[B, ...] -> [count, B / count, ...], example i to micro-batch i % count.

    So each device cuts up its own examples, and a micro-batch is the same on every mesh.
    """
    parts = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
    return sharding.constrain_batch(parts, PartitionSpec(None, *sharding.BATCH))


def _join(parts: jax.Array) -> jax.Array:
    """Undoes `_split`."""
    return sharding.constrain_batch(parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:]))


def lower_step(state: TrainState, batch: Any, *, mesh: Mesh, **settings) -> jax.stages.Lowered:
    """`train_step` for a mesh, to be compiled; the state passed to the result is donated.

    Args:
      state, batch: arrays or `ShapeDtypeStruct`s with shardings.
      mesh: of the run.
      **settings: the other arguments of `train_step`.

    Returns:
      What compiles to the program, callable as step(state, batch) like `train_step`; it can also
      tell the memory and the operations it needs.
    """
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(
        partial(train_step, **settings),
        donate_argnums=0,
        out_shardings=(state_shardings, sharding.replicated(mesh)),
    )
    with jax.set_mesh(mesh):
        return step.lower(state, batch)
