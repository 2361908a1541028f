"""The device mesh and the one table that says where parameters live."""

import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from clip_jax.errors import UserError

# From the slowest network to the fastest. "slice": TPU slices joined by the data-centre network;
# "data": examples only; "fsdp": examples, and parameters gathered layer by layer; "tensor": the
# heads and hidden units of every transformer block, whose groups see the same examples.
AXES = ("slice", "data", "fsdp", "tensor")
BATCH = PartitionSpec(AXES[:-1])
# Where no parameter is involved, as in the loss, the tensor axis splits the examples too.
EVERY_AXIS = PartitionSpec(AXES)


class Placement(NamedTuple):
    """The way that a parameter is split.

    Attributes:
      fsdp: whether the fsdp axis splits the largest dimension that it divides.
      tensor: dimension, counted from the last, that the tensor axis splits; None: none.
    """

    fsdp: bool = True
    tensor: int | None = None


# (regular expression on the parameter's path, placement); the first that matches holds. Optimiser
# moments carry their parameter's path and follow it. A block's first product is split by columns
# and its second by rows, so that each needs one all-reduce (Megatron-LM).
RULES = (
    (r"logit_(scale|bias)$", Placement(fsdp=False)),
    (r"batch_stats/", Placement(fsdp=False)),
    (r"blocks/qkv/kernel$", Placement(tensor=-2)),
    (r"blocks/qkv/bias$", Placement(fsdp=False, tensor=-2)),
    (r"blocks/attn_out/kernel$", Placement(tensor=-3)),
    (r"blocks/mlp_in/kernel$", Placement(tensor=-1)),
    (r"blocks/mlp_in/bias$", Placement(fsdp=False, tensor=-1)),
    (r"blocks/mlp_out/kernel$", Placement(tensor=-2)),
    (r"(scale|bias)$", Placement(fsdp=False)),
    (r".*", Placement()),
)


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    slices: int = 1,
    devices: list[jax.Device] | None = None,
) -> Mesh:
    """Makes a mesh with axes `AXES` over all devices of all processes.

    Args:
      data: devices along the pure data axis; -1: as many as remain.
      fsdp: devices along the fsdp axis.
      tensor: devices along the tensor axis, which is innermost, so that its traffic stays close.
      slices: TPU slices; the other axes multiply to the devices of one.
      devices: devices of the mesh; None: all.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count, inner = len(devices), fsdp * tensor * slices
    asked = f"mesh.slices={slices}, mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor}"
    if min(fsdp, tensor, slices) < 1 or data == 0 or data < -1:
        raise UserError(f"{asked}: axes are positive, or data=-1.")
    if data == -1 and count % inner == 0:
        data = count // inner
    if data * inner != count:
        raise UserError(
            f"The mesh {asked} does not cover the {count} device(s) of this run. Leave "
            "--config.mesh.data=-1 and let --config.mesh.slices x fsdp x tensor be one of: "
            f"{_divisors(count)}."
        )
    own_slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(own_slices) > 1 and slices != len(own_slices):
        raise UserError(
            f"These devices form {len(own_slices)} slices, the config names {slices}: set "
            f"--config.mesh.slices={len(own_slices)}, so that the slow network between them "
            "carries only what it must."
        )
    axis_types = (jax.sharding.AxisType.Auto,) * len(AXES)
    if slices > 1:  # make_mesh would order devices as if one network joined them all
        inside, across = (1, data, fsdp, tensor), (slices, 1, 1, 1)
        if len(own_slices) > 1:
            grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices)
        else:  # as when slices are rehearsed on a CPU
            grid = np.array(devices).reshape(slices, data, fsdp, tensor)
        return Mesh(grid, AXES, axis_types=axis_types)
    return jax.make_mesh((1, data, fsdp, tensor), AXES, axis_types=axis_types, devices=devices)


def _divisors(count: int) -> str:
    return ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)


def check_batch(batch_size: int, accum_steps: int, mesh: Mesh) -> None:
    """Checks that a mesh divides a batch, and each of its micro-batches.

    Raises:
      UserError: it does not; names batch sizes and accumulations that fit.
    """
    if accum_steps < 1:
        raise UserError(f"accum_steps is {accum_steps}: it is 1, or the number of micro-batches.")
    shards = batch_shards(mesh)
    # The loss spreads the whole batch over all devices, the towers each micro-batch over `shards`.
    unit = math.lcm(mesh.size, shards * accum_steps)
    if batch_size % unit:
        nearest = max(round(batch_size / unit), 1) * unit
        pieces = f" in {accum_steps} micro-batches" if accum_steps > 1 else ""
        most = batch_size // shards if batch_size % mesh.size == 0 else 0
        other = f" Or keep it, with --config.accum_steps one of: {_divisors(most)}." if most else ""
        raise UserError(
            f"batch_size {batch_size} cannot be split evenly over {mesh.size} devices{pieces}: "
            f"take a multiple of {unit}, such as --config.batch_size={nearest}.{other}"
        )


def batch_shards(mesh: Mesh) -> int:
    """Counts the parts that the batch is split into."""
    return mesh.size // mesh.shape["tensor"]


def process_part(mesh: Mesh) -> tuple[int, int]:
    """Returns the part of each batch that this process loads, and the number of parts.

    Processes that the tensor axis joins see the same examples, and all load them.

    Raises:
      UserError: the hosts' parts overlap, or differ in size.
    """
    shards = mesh.devices.reshape(-1, mesh.shape["tensor"])
    owned: dict[int, set[int]] = {}
    for shard, devices in enumerate(shards):
        for device in devices:
            owned.setdefault(device.process_index, set()).add(shard)
    parts = sorted({tuple(sorted(part)) for part in owned.values()})
    if sum(map(len, parts)) != len(shards) or len({len(part) for part in parts}) > 1:
        raise UserError(
            f"On the mesh {dict(mesh.shape)} the {len(owned)} hosts would load overlapping parts "
            "of the batch: choose a --config.mesh.tensor that divides a host's devices."
        )
    return parts.index(tuple(sorted(owned[jax.process_index()]))), len(parts)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays whose first dimension is the global batch."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def to_host(array: Shaped[Array, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    """Copies a replicated array to the host, also where other hosts hold replicas of it."""
    return np.asarray(array.addressable_data(0))


def constrain_batch(
    x: Shaped[Array, "*shape"], spec: PartitionSpec = BATCH
) -> Shaped[Array, "*shape"]:
    """Keeps the batch dimension of an activation split; no effect outside `jax.set_mesh`."""
    if set(AXES) <= set(jax.sharding.get_abstract_mesh().axis_names):
        return jax.lax.with_sharding_constraint(x, spec)
    return x


def spread_batch(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Splits the batch dimension over the tensor axis too, where that divides it.

    For layers whose parameters that axis does not split: its devices would otherwise all compute
    the same.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.shape.get("tensor", 1) == 1 or x.shape[0] % mesh.size:
        return x
    return constrain_batch(x, EVERY_AXIS)


def constrain_update(tree: Any, zero1: bool) -> Any:
    """Splits parameters, or gradients, like the optimiser's state; no effect outside `set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if not set(AXES) <= set(mesh.axis_names):
        return tree
    axes = ("data", "fsdp") if zero1 else ("fsdp",)

    def constrain(path, leaf):
        spec = _spec(path_name(path), leaf.shape, mesh, axes)
        return jax.lax.with_sharding_constraint(leaf, spec)

    return jax.tree_util.tree_map_with_path(constrain, tree)


def tree_shardings(tree: Any, mesh: Mesh, zero1: bool = False) -> Any:
    """Returns shardings for a pytree of arrays or shapes, by `RULES`.

    Args:
      tree: a `TrainState`, or part of one.
      mesh: devices of the run.
      zero1: split what stands under opt_state and ema over the data axis too (ZeRO, stage 1).
    """

    def leaf_sharding(path, leaf):
        name = path_name(path)
        beside = name.startswith(("opt_state/", "ema/"))
        axes = ("data", "fsdp") if zero1 and beside else ("fsdp",)
        return NamedSharding(mesh, _spec(name, np.shape(leaf), mesh, axes))

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def path_name(path: tuple) -> str:
    """Returns a tree path as "text/transformer/blocks/qkv/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _spec(name: str, shape: tuple[int, ...], mesh: Any, axes: tuple[str, ...]) -> PartitionSpec:
    placement = next(placement for rule, placement in RULES if re.search(rule, name))
    spec: list[Any] = [None] * len(shape)
    if placement.tensor is not None and mesh.shape["tensor"] > 1:
        spec[placement.tensor] = "tensor"
    # Not the leading axis of stacked layers: the scan slices it, and would gather every layer.
    first = 1 if "/blocks/" in name else 0
    while placement.fsdp and axes:
        ways = math.prod(mesh.shape[axis] for axis in axes)
        free = [d for d in range(first, len(shape)) if spec[d] is None and shape[d] % ways == 0]
        if free and ways > 1:
            spec[max(free, key=lambda d: shape[d])] = axes if len(axes) > 1 else axes[0]
            break
        axes = axes[1:]  # fewer devices are better than the whole on each
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)
