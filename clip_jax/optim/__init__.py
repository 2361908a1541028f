"""The optimiser: which parameters learn, by what rule, and at what rate."""

from clip_jax.optim.optimizers import Optimizer, decay_mask, make_optimizer, updates_applied
from clip_jax.optim.paths import ALL, Factors, find, merge
from clip_jax.optim.rounding import (
    apply_updates,
    round_tree,
    stochastic_round,
    to_bf16,
    to_float32,
)
from clip_jax.optim.schedules import make_schedule

__all__ = [
    "ALL",
    "Factors",
    "Optimizer",
    "apply_updates",
    "decay_mask",
    "find",
    "make_optimizer",
    "make_schedule",
    "merge",
    "round_tree",
    "stochastic_round",
    "to_bf16",
    "to_float32",
    "updates_applied",
]
