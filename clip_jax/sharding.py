"""The device mesh and the one table that says where parameters live."""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clip_jax.errors import UserError

AXES = ("data", "fsdp")
# The batch is split over every axis: an fsdp group shares parameters, not examples.
BATCH = PartitionSpec(AXES)

# (regular expression on the parameter's path, placement); the first that matches holds. Optimiser
# moments carry their parameter's path and follow it.
#   "replicated": whole on every device.
#   "fsdp": split along the largest dimension that the fsdp axis divides, if there is one.
RULES = (
    (r"logit_scale$", "replicated"),
    (r"batch_stats/", "replicated"),
    (r"(scale|bias)$", "replicated"),
    (r".*", "fsdp"),
)


def make_mesh(data: int, fsdp: int, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with axes `AXES` over all devices of all processes.

    Args:
      data: devices along the data axis; -1: as many as remain.
      fsdp: devices along the fsdp axis, which is innermost, so that its traffic stays close.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    count = len(devices) if devices is not None else jax.device_count()
    if fsdp < 1 or data == 0 or data < -1:
        raise UserError(f"mesh.data={data}, mesh.fsdp={fsdp}: axes are positive, or data=-1.")
    if data == -1 and count % fsdp == 0:
        data = count // fsdp
    if data * fsdp != count:
        fitting = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise UserError(
            f"The mesh data={data} x fsdp={fsdp} does not cover the {count} device(s) of this run. "
            f"Leave --config.mesh.data=-1 and set --config.mesh.fsdp to one of: {fitting}."
        )
    axis_types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh((data, fsdp), AXES, axis_types=axis_types, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose first dimension is the global batch."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keeps the batch dimension of an activation split; no effect outside `jax.set_mesh`."""
    if set(AXES) <= set(jax.sharding.get_abstract_mesh().axis_names):
        return jax.lax.with_sharding_constraint(x, BATCH)
    return x


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """Shardings for a pytree of arrays or shapes, by `RULES`."""

    def leaf_sharding(path, leaf):
        return NamedSharding(mesh, _spec(path_name(path), np.shape(leaf), mesh.shape["fsdp"]))

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def path_name(path: tuple) -> str:
    """A tree path as "text/transformer/blocks/qkv/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _spec(name: str, shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    placement = next(placement for rule, placement in RULES if re.search(rule, name))
    if placement == "replicated" or fsdp == 1:
        return PartitionSpec()
    # Not the leading axis of stacked layers: the scan slices it, and would gather every layer.
    first = 1 if "/blocks/" in name else 0
    divisible = [d for d in range(first, len(shape)) if shape[d] % fsdp == 0]
    if not divisible:
        return PartitionSpec()
    largest = max(divisible, key=lambda d: shape[d])
    return PartitionSpec(*("fsdp" if d == largest else None for d in range(largest + 1)))
