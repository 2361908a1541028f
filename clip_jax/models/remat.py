"""What the backward pass computes again: `model.remat`, the same names for both kinds of tower."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from flax import linen as nn

from clip_jax.errors import UserError

# What is kept for the backward pass. Matrix products are those of convolutions as well, but for
# "no_batch_dims", which names plain ones only.
POLICIES: Mapping[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "everything_saveable": jax.checkpoint_policies.everything_saveable,
}

Part = TypeVar("Part", bound=Callable)


def remat_layer(layer: Callable, remat: str, scanned: bool) -> Callable:
    """Wraps a layer so that the backward pass recomputes what `remat` says.

    Args:
      layer: function of (carry, params).
      remat: "none" keeps all activations, "full" only the layer's input; other names are those of
        `POLICIES`.
      scanned: whether the layer is the body of a scan.

    Raises:
      UserError: unknown name.
    """
    if remat == "none":
        return layer
    # Unrolled, a compiler would find what is computed twice, and keep it. (XLA's for the CPU still
    # does; the planner's tests see that the one for TPUs does not.)
    return jax.checkpoint(layer, policy=_policy(remat), prevent_cse=not scanned)


def remat_part(part: Part, remat: str) -> Part:
    """The same for a class of modules, or a method of one, called as (x, train).

    Parameters and statistics keep their names and values: statistics move once, in the forward
    pass.
    """
    if remat == "none":
        return part
    return nn.remat(part, policy=_policy(remat), static_argnums=2)


def _policy(remat: str) -> Any:
    if remat not in POLICIES:
        known = ", ".join(["none", *sorted(POLICIES)])
        raise UserError(f"Unknown rematerialisation {remat!r}: model.remat is one of {known}.")
    return POLICIES[remat]
