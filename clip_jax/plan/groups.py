"""The groups of devices of a collective, and the axes of the mesh that it crosses."""

import re
from typing import Any

import numpy as np
from jaxtyping import Int

from clip_jax.plan.hlo import Instruction


def device_groups(instruction: Instruction, devices: int) -> Int[np.ndarray, "groups members"]:
    """Reads the groups of a collective as device ids.

    Ids count the devices of the program in its own order, which is that of mesh.devices.flat.

    Args:
      instruction: an all-gather, all-reduce, reduce-scatter or all-to-all.
      devices: number of devices of the program.
    """
    text = instruction.attributes
    start = text.find("replica_groups=")
    if start < 0:
        return np.arange(devices)[None]
    text = text[start + len("replica_groups=") :]
    if text.startswith("mesh["):
        return _mesh_groups(text)
    if text.startswith("["):
        sizes, rest = _match(r"\[([\d,]+)\]<=(\S*)", text)
        return _iota(rest).reshape([int(n) for n in sizes.split(",")])
    (listed,) = _match(r"\{(\{[\d,{}]*\})?\}", text)
    if not listed:  # {}: all of them together
        return np.arange(devices)[None]
    rows = [row.split(",") for row in re.findall(r"\{([\d,]+)\}", listed)]
    return np.array([[int(n) for n in row] for row in rows])


def _mesh_groups(text: str) -> Int[np.ndarray, "groups members"]:
    """Reads the groups along some axes: mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}."""
    axes, order, along = _match(r"mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? ?\{([^}]*)\}", text)
    sizes = [(name, int(size)) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)]
    shape = [size for _, size in sizes]
    ids = (_iota(order) if order else np.arange(np.prod(shape))).reshape(shape)
    # A part of an axis may be named, as in 'a':(2)4: an axis of size 2 x 4 x rest, its middle.
    ids, names = _split_axes(ids, [name for name, _ in sizes], along)
    wanted = [names.index(name) for name in re.findall(r"'[^']*'(?::\(\d+\)\d+)?", along)]
    others = [i for i in range(ids.ndim) if i not in wanted]
    size = int(np.prod([ids.shape[i] for i in wanted], dtype=int))
    return ids.transpose(others + wanted).reshape(-1, size)


def _split_axes(
    ids: Int[np.ndarray, "*axes"], axes: list[str], along: str
) -> tuple[Int[np.ndarray, "*split_axes"], list[str]]:
    """Splits the axes that are named in part: then every name stands for one dimension."""
    shape, names = [], []
    for name, size in zip(axes, ids.shape):
        part = re.search(rf"'{re.escape(name)}':\((\d+)\)(\d+)", along)
        if part:
            before, count = int(part.group(1)), int(part.group(2))
            shape += [before, count, size // before // count]
            names += [f"{name} before", part.group(0), f"{name} behind"]
        else:
            shape.append(size)
            names.append(f"'{name}'")
    return ids.reshape(shape), names


def _match(pattern: str, text: str) -> tuple[Any, ...]:
    found = re.match(pattern, text)
    if not found:
        raise ValueError(f"Groups of devices in a form that is not known: {text[:80]!r}.")
    return found.groups()


def _iota(text: str) -> Int[np.ndarray, " devices"]:
    """Reads the order [8,4]T(1,0): ids counted in rows of 8 x 4, then transposed."""
    shape, transposed = _match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    sizes = [int(n) for n in shape.split(",")]
    ids = np.arange(np.prod(sizes)).reshape(sizes)
    if transposed:
        ids = ids.transpose([int(n) for n in transposed.split(",")])
    return ids.ravel()


def source_target_pairs(instruction: Instruction) -> Int[np.ndarray, "pairs 2"]:
    """Reads the pairs (sender, receiver) of a collective-permute as device ids."""
    pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attribute("source_target_pairs"))
    return np.array([[int(a), int(b)] for a, b in pairs], int).reshape(-1, 2)


def axes_crossed(
    groups: Int[np.ndarray, "groups members"], shape: dict[str, int]
) -> tuple[str, ...]:
    """Finds the axes of a mesh along which members of a group differ.

    Args:
      groups: device ids.
      shape: sizes of the mesh by axis, in order; their product covers the ids.
    """
    if groups.size == 0:
        return ()
    at = np.unravel_index(groups, tuple(shape.values()))
    return tuple(axis for axis, index in zip(shape, at) if (index != index[:, :1]).any())
