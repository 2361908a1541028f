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
from jaxtyping import Array, Bool, Float, Float32, Int, Key, Shaped

from clip_jax import optim, sharding
from clip_jax.losses import geometry
from clip_jax.optim import to_float32
from clip_jax.state import TrainState

# "image" uint8 [B, h, w, 3] and "tokens" int32 [B, s], with c captions an image [B, c, s]; where
# pairs have weights, "weight" float32 [B].
Batch = dict[str, Shaped[Array, "batch ..."]]
TOWERS = ("image", "text")  # names in the parameters
Metrics = dict[str, Float32[Array, ""]]
Outputs = dict[str, Float[Array, "..."]]  # of the model, by name
# Takes the outputs of the model and the fields of the batch beside images and tokens.
Loss = Callable[[Outputs, Batch], jax.Array]
# Does the same, and returns with the loss its terms, where it is a sum of several.
Objective = Callable[[Outputs, Batch], tuple[jax.Array, Metrics]]
# Takes images and a PRNG key, and returns fields of the batch: "image", and what goes beside it.
Augment = Callable[[jax.Array, jax.Array], Batch]
# (params, part of the batch) -> outputs of the model, new BatchNorm statistics.
Embed = Callable[[Any, Batch], tuple[Outputs, Any]]
# Scope of the update where it may be skipped, by which the planner knows that it rarely is.
SKIPPABLE = "skippable_update"


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    net: nn.Module,
    optimizer: optim.Optimizer,
    loss_fn: Objective,
    augment: Augment,
    accum_steps: int,
    zero1: bool,
    seed: int,
    max_logit_scale: float,
    skip_above: float | None,
) -> tuple[TrainState, Metrics]:
    """Updates the state on the global batch.

    A skipped step changes nothing but `step`, so that order and randomness go on: parameters,
    BatchNorm statistics and the optimiser, its count included, keep every bit.

    Args:
      state: training state.
      batch: as in `Batch`, split over the mesh.
      net: one of `clip_jax.models.MODULES`.
      optimizer: the optimiser. No gradient is computed of parameters that do not learn.
      loss_fn: loss of the outputs of the model; see `objectives.OBJECTIVES`.
      augment: augmentation, called with the images and a key of this step; see `augment.augment`
        and `views.two_views`.
      accum_steps: micro-batches that the towers embed one after the other; the loss is that of the
        whole batch either way.
      zero1: split the optimiser's state over the data axis; see `sharding.tree_shardings`.
      seed: PRNG seed; all randomness is folded from it by step and by the example's place in the
        batch.
      max_logit_scale: bound on the multiplier exp(logit_scale), applied after the update.
      skip_above: gradient norm above which the step is skipped; a step whose loss or gradient norm
        is not finite is skipped as well. None: no step is.

    Returns:
      The new state, and scalars: loss, and its terms where there are several; grad_norm (before
      clipping) and param_norm, both also by tower; learning_rate; where the model has one,
      logit_scale (the multiplier); where it compares embeddings, their alignment and uniformity;
      and, where steps are skipped, skipped (0 or 1).
    """
    dropout_key, rounding_key, augment_key = keys(seed, state.step)

    def embed(learnt, part):
        outputs, updated = net.apply(
            {
                "params": optim.merge(learnt, state.params),
                "batch_stats": state.batch_stats,
                "learns": learns,
            },
            part,
            train=True,
            rngs={"dropout": dropout_key},
            mutable=["batch_stats"],
            method="outputs",
        )
        return outputs, updated.get("batch_stats", {})

    beside = {name: field for name, field in batch.items() if name not in ("image", "tokens")}
    rows = jnp.arange(len(batch["image"]))
    batch = {**batch, **augment(batch["image"], augment_key), "row": rows}
    gradients = _gradients if accum_steps == 1 else partial(_accumulated, accum_steps)
    learns = optimizer.factors.learns(state.params)
    learnt = optimizer.factors.select(state.params)
    loss, (batch_stats, measured), grads = gradients(
        embed, lambda outputs: loss_fn(outputs, beside), learnt, batch
    )
    # From here on each device works on its own shards, which under ZeRO are smaller than those it
    # holds of the parameters.
    constrain = partial(sharding.constrain_update, zero1=zero1)
    grads = constrain(to_float32(grads))
    metrics = {"loss": loss, **measured, **_norms("grad_norm", grads)}
    old: Any = constrain(learnt)

    def update() -> tuple[Any, Any, Any, Any]:
        updates, opt_state = optimizer.rule.update(
            grads, state.opt_state, constrain(to_float32(learnt))
        )
        updates = optimizer.factors.scale(updates, state.params)
        params: Any = constrain(optim.apply_updates(old, updates, rounding_key))
        if params.get("logit_scale") is not None:
            logit_scale = jnp.minimum(params["logit_scale"], math.log(max_logit_scale))
            params = {**params, "logit_scale": logit_scale}
        return params, batch_stats, opt_state, _averaged(optimizer.ema_decay, state, params)

    if skip_above is None:
        params, batch_stats, opt_state, ema = update()
    else:
        applied = _is_finite_up_to(skip_above, metrics)
        with jax.named_scope(SKIPPABLE):
            # Cheaper than a selection by jnp.where, which keeps a copy of the old state and takes
            # another pass over both.
            params, batch_stats, opt_state, ema = jax.lax.cond(
                applied, update, lambda: (old, state.batch_stats, state.opt_state, state.ema)
            )
        metrics["skipped"] = 1.0 - applied
    params = optim.merge(params, state.params)
    if "logit_scale" in params:
        metrics["logit_scale"] = jnp.exp(params["logit_scale"])
    metrics |= _norms("param_norm", to_float32(params))
    learning_rate = optimizer.schedule(optim.updates_applied(state.opt_state))
    metrics["learning_rate"] = jnp.asarray(learning_rate, jnp.float32)
    state = TrainState(state.step + 1, params, batch_stats, opt_state, ema)
    return state, metrics


def keys(seed: int, step: Int[Array, ""]) -> tuple[Key[Array, ""], ...]:
    """Returns the keys of a step: of dropout, of rounding, and of the augmentation."""
    return tuple(jax.random.split(jax.random.fold_in(jax.random.key(seed), step), 3))


def _averaged(decay: float, state: TrainState, learnt: Any) -> Any:
    """Moves the average of the parameters, float32, towards what those that learn have become.

    In the first steps it decays faster, by (1 + n) / (10 + n) after n updates, since it begins at
    the random initialisation.
    """
    if state.ema is None:
        return None
    updates = optim.updates_applied(state.opt_state)
    rate = 1 - jnp.minimum(decay, (1 + updates) / (10 + updates))
    learnt = to_float32(learnt)
    averaged = jax.tree.map(
        lambda new, old: old if new is None else old + rate * (new - old),
        learnt,
        state.ema["params"],
        is_leaf=lambda x: x is None,
    )
    return {"params": averaged}


def _is_finite_up_to(greatest_norm: float, metrics: Metrics) -> Bool[Array, ""]:
    """Returns whether loss and gradient norm are finite, and the norm is no greater than that."""
    loss, norm = metrics["loss"], metrics["grad_norm"]
    return jnp.isfinite(loss) & jnp.isfinite(norm) & (norm <= greatest_norm)


def _norms(name: str, tree: Any) -> Metrics:
    """Computes the norm of all, of each tower, and of what belongs to neither, such as logit_scale.

    The compiler computes each leaf's sum of squares once for both.
    """
    towers = {tower: tree[tower] for tower in TOWERS if tower in tree}
    others = {key: part for key, part in tree.items() if key not in towers}
    parts = {**towers, **({"other": others} if others else {})}
    norms = {f"{name}/{part}": optax.tree.norm(leaves) for part, leaves in parts.items()}
    return {name: optax.tree.norm(tree), **norms}


def _geometry(outputs: Outputs, params: Any) -> Metrics:
    """Measures alignment and uniformity, where the outputs are embeddings of pairs.

    Two views of an image count as one tower: the first is measured. So is the first caption.
    """
    outputs = jax.lax.stop_gradient(outputs)
    if "image" in outputs:
        images, texts = outputs["image"], outputs["text"]
        texts = texts if texts.ndim == 2 else texts[:, 0]
    elif "views" in outputs:
        images, texts = jnp.unstack(outputs["views"], axis=1)
    else:
        return {}
    if len(images) < 2:
        return {}
    towers = {"image": images, "text": texts}
    uniformity = {
        f"uniformity/{tower}": geometry.uniformity(embeds)
        for tower, embeds in towers.items()
        if tower in params
    }
    return {"alignment": geometry.alignment(images, texts), **uniformity}


def _gradients(
    embed: Embed,
    loss_fn: Callable[[Outputs], tuple[jax.Array, Metrics]],
    params: Any,
    batch: Batch,
) -> tuple[Float[Array, ""], tuple[Any, Metrics], Any]:
    """Computes loss, BatchNorm statistics, metrics and gradients of the whole batch at once."""

    def loss(params):
        outputs, batch_stats = embed(params, batch)
        value, terms = loss_fn(outputs)
        return value, (batch_stats, {**terms, **_geometry(outputs, params)})

    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return value, aux, grads


def _accumulated(
    count: int,
    embed: Embed,
    loss_fn: Callable[[Outputs], tuple[jax.Array, Metrics]],
    params: Any,
    batch: Batch,
) -> tuple[Float[Array, ""], tuple[Any, Metrics], Any]:
    """Computes the same with the activations of one micro-batch alive at a time.

    GradCache (Gao et al. 2021, arXiv:2101.06983). All micro-batches are embedded; the loss of all
    embeddings gives the gradient of each; then every micro-batch is embedded once more, to carry
    its part of that gradient to the parameters. BatchNorm normalises by micro-batch, and its
    running statistics move once, by their mean.
    """
    parts = jax.tree.map(partial(split, count), batch)
    _, (outputs, batch_stats) = jax.lax.scan(lambda _, part: (_, embed(params, part)), None, parts)
    # Scalar outputs are parameters, equal in every micro-batch; others have the batch first.
    outputs = {name: join(x) if x.ndim > 1 else x[0] for name, x in outputs.items()}
    (value, terms), gradients = jax.value_and_grad(loss_fn, has_aux=True)(outputs)
    d_outputs = {
        name: split(count, x) if x.ndim else jnp.broadcast_to(x / count, count)
        for name, x in gradients.items()
    }

    def replay(grads, part_and_gradient):
        part, d_outputs = part_and_gradient
        _, pull_back, _ = jax.vjp(lambda p: embed(p, part), params, has_aux=True)
        return jax.tree.map(jnp.add, grads, to_float32(pull_back(d_outputs)[0])), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    grads, _ = jax.lax.scan(replay, zeros, (parts, d_outputs))
    batch_stats = jax.tree.map(lambda x: x.mean(axis=0), batch_stats)
    return value, (batch_stats, {**terms, **_geometry(outputs, params)}), grads


def split(
    count: int, x: Shaped[Array, " batch *features"]
) -> Shaped[Array, "{count} part *features"]:
    """Splits a batch into micro-batches, example i into number i % count.

    So each device splits its own examples, and a micro-batch is the same on every mesh.
    """
    parts = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
    return sharding.constrain_batch(parts, PartitionSpec(None, *sharding.BATCH))


def join(parts: Shaped[Array, "count part *features"]) -> Shaped[Array, " batch *features"]:
    """Inverts `split`."""
    return sharding.constrain_batch(parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:]))


def lower_step(
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    state: TrainState,
    batch: Any,
    mesh: Mesh,
) -> jax.stages.Lowered:
    """Lowers a step for a mesh, to be compiled; the state passed to the result is donated.

    Args:
      step: `train_step`, its settings bound.
      state, batch: arrays or `ShapeDtypeStruct`s with shardings.
      mesh: devices of the run.

    Returns:
      The lowered step. Compiled, it is called as step(state, batch), and reports the memory and
      FLOPs that it needs.
    """
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    out_shardings = state_shardings, sharding.replicated(mesh)
    with jax.set_mesh(mesh):
        jitted = jax.jit(
            step,
            donate_argnums=0,
            out_shardings=out_shardings,
            compiler_options=_compiler_options(mesh.devices.flat[0]),
        )
        return jitted.lower(state, batch)


# KiB of a core's memory (VMEM) that one operation may take, by the kind of device, as JAX names it;
# the compiler's default is 16 MiB. With more, a matrix product is cut into larger tiles and reads
# its operands less often; what is left holds arrays between operations.
_VMEM = {"TPU v5 lite": 48 * 2**10, "TPU v6 lite": 48 * 2**10}


def _compiler_options(device: jax.Device) -> dict[str, str]:
    limit = _VMEM.get(device.device_kind)
    return {"xla_tpu_scoped_vmem_limit_kib": str(limit)} if limit else {}
