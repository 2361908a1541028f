"""The rules by which parameters learn; the paper's is AdamW with decoupled decay."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32
from optax import contrib

from clip_jax import sharding
from clip_jax.optim import paths
from clip_jax.optim.rounding import bf16_state


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimiser: what becomes of gradients.

    Attributes:
      rule: the updates of the parameters that learn, from their float32 gradients; the others are
        None in what it takes and returns.
      schedule: its learning rate by step.
      factors: factors on the learning rate, by parameter; 0 where one does not learn.
      bf16_params: regular expression on the paths of parameters stored in bfloat16; "": none.
      ema_decay: decay rate of a moving average of the parameters; 0: none is kept.
    """

    rule: optax.GradientTransformation
    schedule: optax.Schedule
    factors: paths.Factors = paths.ALL
    bf16_params: str = ""
    ema_decay: float = 0.0


def make_optimizer(schedule: optax.Schedule, settings: Any, seed: int) -> Optimizer:
    """Makes the optimiser of a config.

    Args:
      schedule: learning rate by step.
      settings: fields of config.optim.
      seed: PRNG seed of stochastic rounding, for settings.moment_dtype "bfloat16".

    Raises:
      UserError: settings.factors is no table of factors.
    """
    clip = settings.grad_clip_norm
    rule = RULES[settings.name](settings)
    if settings.moment_dtype == "bfloat16":
        rule = bf16_state(rule, seed)
    rule = optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        rule,
        optax.add_decayed_weights(
            _decay(settings), mask=partial(decay_mask, pattern=settings.decay_params)
        ),
        _trust_ratio() if settings.name == "lamb" else optax.identity(),
        optax.scale_by_learning_rate(schedule),
    )
    factors = paths.Factors.parse(settings.factors)
    return Optimizer(rule, schedule, factors, settings.bf16_params, settings.ema_decay)


def _decay(settings: Any) -> float:
    """Returns the decay by which the optimiser multiplies the learning rate."""
    if not (settings.independent_decay and settings.learning_rate):
        return settings.weight_decay
    return settings.weight_decay / settings.learning_rate


def updates_applied(opt_state: Any) -> Int32[Array, ""]:
    """Returns the number of updates in a state of `Optimizer.rule`, which its schedule counts."""
    return opt_state[-1].count


def decay_mask(params: Any, pattern: str) -> Any:
    """Returns True for the parameters whose path the regular expression finds.

    Raises:
      UserError: the pattern is no regular expression, or finds nothing.
    """
    return paths.find(params, pattern, "optim.decay_params")


def _adam(settings: Any) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=settings.b1, b2=settings.b2, eps=settings.eps)


def _lion(settings: Any) -> optax.GradientTransformation:
    return optax.scale_by_lion(b1=settings.b1, b2=settings.b2)


def _adafactor(settings: Any) -> optax.GradientTransformation:
    """Makes Adafactor in the form of Zhai et al. 2022 (arXiv:2106.04560, section 3.4).

    A second moment of rows and columns, whose decay rate grows to b2, and a first moment.
    """

    def decay_rate(step, exponent):
        return jnp.minimum(settings.b2, 1 - (jnp.float32(step) + 1) ** -exponent)

    return optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=32, decay_rate_fn=decay_rate),
        optax.ema(settings.b1, debias=False),
    )


def _muon(settings: Any) -> optax.GradientTransformation:
    """Makes Muon for the matrices of transformer blocks, and Adam for what else there is.

    Both have updates of the root mean square that Adam's usually have, 0.2, so that one learning
    rate and one decay fit (Liu et al. 2025, arXiv:2502.16982).
    """

    def label(path: tuple, _: Any) -> str:
        name = sharding.path_name(path)
        return "muon" if "/blocks/" in name and name.endswith("kernel") else "adam"

    def to_rms(path: tuple, x: jax.Array) -> jax.Array:
        sides = (math.prod(x.shape[axis] for axis in axes) for axes in _sides(path))
        return x * (0.2 * math.sqrt(max(sides)))

    each = jax.tree_util.tree_map_with_path
    muon = contrib.scale_by_muon(
        beta=settings.muon_momentum, weight_dimension_numbers=partial(each, _matrix)
    )
    scale = optax.stateless(lambda updates, params: each(to_rms, updates))
    return optax.partition(
        {"muon": optax.chain(muon, scale), "adam": optax.chain(_adam(settings))},
        partial(each, label),
    )


def _matrix(path: tuple, x: jax.Array) -> contrib.MuonDimensionNumbers:
    del x
    return contrib.MuonDimensionNumbers(*_sides(path))


def _sides(path: tuple) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the dimensions of a block's weights that are the rows and columns of a matrix.

    Others, of the layers, of queries, keys and values, and of a gate, count matrices.
    """
    sides = {"qkv": ((-4,), (-2, -1)), "attn_out": ((-3, -2), (-1,)), "mlp_in": ((1,), (-1,))}
    return sides.get(path[-2].key, ((-2,), (-1,)))


def _trust_ratio() -> optax.GradientTransformation:
    """Scales the update of each layer to the norm of its parameters."""
    ratio = optax.scale_by_trust_ratio()

    def scale(path: tuple, update: jax.Array, param: jax.Array) -> jax.Array:
        def one(update, param):
            return ratio.update(update, optax.ScaleByTrustRatioState(), param)[0]

        stacked = "/blocks/" in sharding.path_name(path)
        return (jax.vmap(one) if stacked else one)(update, param)

    return optax.stateless(partial(jax.tree_util.tree_map_with_path, scale))


# By config.optim.name.
RULES: Mapping[str, Callable[[Any], optax.GradientTransformation]] = {
    "adamw": _adam,
    "lion": _lion,
    "adafactor": _adafactor,
    "lamb": _adam,
    "muon": _muon,
}
