"""The paper's optimiser: AdamW with decoupled decay, linear warm-up, cosine to zero."""

import re
from typing import Any

import jax
import optax

from clip_jax import sharding

# Gains, biases and the temperature do not decay (paper section 2.5); by name, not by rank, because
# the gains of stacked layers are matrices.
NO_DECAY = re.compile(r"(^|/)(scale|bias|logit_scale)$")


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
) -> optax.GradientTransformation:
    """AdamW; `grad_clip_norm` bounds the global gradient norm before it, 0 leaves it."""
    clip = optax.clip_by_global_norm(grad_clip_norm) if grad_clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def decay_mask(params: Any) -> Any:
    """True for the parameters that weight decay applies to."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not NO_DECAY.search(sharding.path_name(path)), params
    )
