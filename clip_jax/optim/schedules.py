"""Learning rates by step: a linear warm-up, then one of several curves, then perhaps a cooldown."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from clip_jax.errors import UserError

Steps = Float[Array, ""]
# (steps since the warm-up, all such steps of the run, timescale) -> fraction of the peak.
CURVES: Mapping[str, Callable[[Steps, int, int], Steps]] = {
    "cosine": lambda t, total, timescale: (1 + jnp.cos(jnp.pi * t / total)) / 2,
    "constant": lambda t, total, timescale: jnp.ones_like(t),
    # Zhai et al. 2022 (arXiv:2106.04560), as in big_vision.
    "rsqrt": lambda t, total, timescale: (1 + t / timescale) ** -0.5,
}
# Fraction of the cooldown that has passed -> fraction of the rate before it.
COOLDOWNS: Mapping[str, Callable[[Steps], Steps]] = {
    "linear": lambda passed: 1 - passed,
    "sqrt": lambda passed: 1 - jnp.sqrt(passed),  # Haegele et al. 2024 (arXiv:2405.18392)
}


def make_schedule(settings: Any, to_steps: Callable[[str], int], total: int) -> optax.Schedule:
    """Returns the learning rate by step, counted from 0.

    As in open_clip, the first step has peak / warmup and the last of the warm-up the peak; a first
    step with rate 0 would change nothing. big_vision's warm-up has exactly that, and so is one step
    behind. A warm-up as long as the run is shortened. A rate that ends at zero would get there in
    the step after the last.

    Args:
      settings: fields of config.optim.
      to_steps: converts a duration to steps.
      total: steps of the run.

    Raises:
      UserError: a cooldown that the schedule cannot have, or that the run has no room for.
    """
    peak, final = settings.learning_rate, settings.final_fraction
    warmup = min(to_steps(settings.warmup), max(total - 1, 0))
    cooldown, timescale = to_steps(settings.cooldown), to_steps(settings.timescale)
    if cooldown and settings.schedule == "cosine":
        raise UserError(
            f"optim.cooldown={settings.cooldown!r} follows a rate that has not fallen yet, and a "
            "cosine falls by itself: set --config.optim.schedule=constant or rsqrt, or leave the "
            "cooldown out."
        )
    if warmup + cooldown > total:
        raise UserError(
            f"optim.warmup={settings.warmup!r} and optim.cooldown={settings.cooldown!r} are "
            f"{warmup + cooldown:,} steps, and the run has {total:,}: shorten them, or give it a "
            "longer --config.duration."
        )
    curve, cool = CURVES[settings.schedule], COOLDOWNS[settings.cooldown_shape]

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        after = jnp.maximum(step - warmup, 0.0)
        fraction = curve(after, max(total - warmup, 1), max(timescale, 1))
        if settings.schedule == "cosine":
            fraction = final + (1 - final) * fraction
        if cooldown:
            passed = jnp.clip((step - (total - cooldown)) / cooldown, 0.0, 1.0)
            fraction *= final + (1 - final) * cool(passed)
        if warmup:
            fraction *= jnp.minimum((step + 1) / warmup, 1.0)
        return peak * fraction

    return schedule
