"""The paper's optimiser: AdamW with decoupled decay, linear warm-up, cosine to zero.

And its two ways to save memory (section 2.5): Adam's moments, and chosen weights, in 16 bits.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clip_jax import sharding
from clip_jax.errors import UserError
from clip_jax.stochastic_rounding import round_tree, to_float32

# Gains, biases and the temperature do not decay (paper section 2.5); by name, not by rank, because
# the gains of stacked layers are matrices.
NO_DECAY = re.compile(r"(^|/)(scale|bias|logit_scale|logit_bias)$")


def make_schedule(peak: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Learning rate of each step: linear from 0 to `peak`, then a cosine that ends at 0."""
    warmup_steps = min(warmup_steps, max(total_steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, max(total_steps, 1))


def make_optimizer(
    schedule: optax.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    grad_clip_norm: float,
    moment_dtype: str,
    seed: int,
) -> optax.GradientTransformation:
    """AdamW on float32 gradients.

    Args:
      schedule: learning rate by step.
      b1, b2, eps: of Adam.
      weight_decay: decoupled, on the parameters of `decay_mask`.
      grad_clip_norm: bounds the global gradient norm before anything else; 0 leaves it.
      moment_dtype: that both moments are kept in; "bfloat16" is rounded randomly.
      seed: of that rounding.
    """
    clip = optax.clip_by_global_norm(grad_clip_norm) if grad_clip_norm else optax.identity()
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    return optax.chain(
        clip,
        _bf16_moments(adam, seed) if moment_dtype == "bfloat16" else adam,
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def decay_mask(params: Any) -> Any:
    """True for the parameters that weight decay applies to."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not NO_DECAY.search(sharding.path_name(path)), params
    )


def _bf16_moments(adam: optax.GradientTransformation, seed: int) -> optax.GradientTransformation:
    """Keeps both moments in bfloat16 between steps; the arithmetic stays float32."""

    def init(params: Any) -> optax.ScaleByAdamState:
        state: Any = adam.init(params)
        mu, nu = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (state.mu, state.nu))
        return optax.ScaleByAdamState(state.count, mu, nu)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, moved = adam.update(updates, to_float32(state), params)
        new: Any = moved
        # The second moment changes by 1 - b2 of itself a step: to nearest, it would stand still.
        key = jax.random.fold_in(jax.random.key(seed), new.count)
        mu, nu = round_tree((new.mu, new.nu), (state.mu, state.nu), key)
        return updates, optax.ScaleByAdamState(new.count, mu, nu)

    return optax.GradientTransformation(init, update)


def to_bf16(params: Any, pattern: str) -> Any:
    """Parameters whose path the regular expression finds, to the nearest bfloat16; "": none.

    Raises:
      UserError: the pattern is none, or finds nothing.
    """
    if not pattern:
        return params
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"optim.bf16_params {pattern!r} is no regular expression: {error}."
        ) from None
    names = []

    def convert(path, leaf):
        name = sharding.path_name(path)
        if not found.search(name):
            return leaf
        names.append(name)
        return leaf.astype(jnp.bfloat16)

    halved = jax.tree_util.tree_map_with_path(convert, params)
    if not names:
        raise UserError(
            f"optim.bf16_params {pattern!r} finds no parameter: their paths begin with "
            f"{', '.join(sorted(params))}."
        )
    return halved


def apply_updates(params: Any, updates: Any, key: jax.Array) -> Any:
    """params + updates in float32; bfloat16 parameters are rounded randomly."""
    return round_tree(optax.apply_updates(to_float32(params), updates), params, key)
