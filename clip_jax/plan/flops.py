"""Operations and memory traffic of single instructions, by their shapes."""

import functools
import math
import re

import numpy as np

from clip_jax.plan.hlo import Array, Computation, Instruction, Module

# No memory traffic of their own: names of existing values, or calls whose parts are counted.
FREE = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
        "while",
        "conditional",
        "call",
        "opt-barrier",
        "add-dependency",
        "domain",
        "iota",
    ]
)
# Transfers over a network.
_ELSEWHERE = frozenset(("send", "recv"))
# Inside a fusion, instructions that pass a parameter on unchanged.
_VIEWS = frozenset(("bitcast", "reshape", "get-tuple-element"))


def matmul_flops(instruction: Instruction, computation: Computation) -> float:
    """Counts multiplications and additions of a dot or a convolution; 0: another instruction."""
    if instruction.opcode == "dot":
        left = _operand(instruction, computation, 0)
        dims = instruction.attribute("lhs_contracting_dims")
        contracted = math.prod(left.dims[int(d)] for d in re.findall(r"\d+", dims))
        return 2.0 * instruction.arrays[0].size * contracted
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, computation)
    return 0.0


def _convolution_flops(instruction: Instruction, computation: Computation) -> float:
    """Counts the operations of a convolution that meet elements of the input.

    Those that meet the padding or a hole of a dilation do not count: the chip skips them. On a TPU
    every matrix product is a convolution; a batch dimension is a spatial one whose window leaves a
    single valid pair per output.
    """
    left, right = (_operand(instruction, computation, i) for i in (0, 1))
    labels = re.match(r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels"))
    assert labels, instruction.name
    inputs, kernel, outputs = labels.groups()
    sizes = [dict(zip(names, a.dims)) for names, a in ((inputs, left), (kernel, right))]
    result = dict(zip(outputs, instruction.arrays[0].dims))
    batches = int(instruction.attribute("batch_group_count") or 1)
    pairs = sizes[1]["i"] * result["f"] * sizes[0]["b"] // batches
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", instruction.attribute("window")))
    for i in range(len(inputs) - 2):
        digit = str(i)
        pairs *= _valid_positions(
            sizes[0][digit],
            sizes[1][digit],
            result[digit],
            _field(window, "stride", i, 1),
            _field(window, "pad", i, 0),
            _field(window, "lhs_dilate", i, 1),
            _field(window, "rhs_dilate", i, 1),
        )
    return 2.0 * pairs


def _field(window: dict[str, str], name: str, i: int, default: int) -> int:
    """Reads the i-th number of a window "size=2x3 pad=1_1x0_0"; of padding the one in front."""
    if name not in window:
        return default
    return int(window[name].split("x")[i].split("_")[0])


@functools.cache
def _valid_positions(
    size: int, kernel: int, outputs: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Counts (output, kernel) pairs of one spatial dimension that meet an input element."""
    at = np.arange(outputs)[:, None] * stride + np.arange(kernel)[None] * rhs_dilate - pad
    inside = (at >= 0) & (at <= (size - 1) * lhs_dilate) & (at % lhs_dilate == 0)
    return int(inside.sum())


def _operand(instruction: Instruction, computation: Computation, i: int) -> Array:
    return computation.instructions[instruction.operands[i]].arrays[0]


def memory_traffic(instruction: Instruction, computation: Computation, module: Module) -> float:
    """Counts the bytes that an executed instruction reads from and writes to HBM.

    Arrays in a core's vector memory do not count. A fusion that takes a slice
    of an operand reads the slice, and one that updates a slice in place writes the slice.
    """
    if instruction.opcode in FREE | _ELSEWHERE or instruction.opcode.endswith("-done"):
        return 0.0
    operands = [computation.instructions[name] for name in instruction.operands]
    if instruction.opcode == "slice-start":  # returns (operands, result, context)
        result = instruction.arrays[len(operands)]
        return result.bytes * (bool(_hbm_bytes(operands[0])) + (result.space == 0))
    if instruction.opcode == "copy-start":  # returns (result, operand, context)
        return sum(float(array.bytes) for array in instruction.arrays[:2] if array.space == 0)
    if instruction.opcode.endswith("-start"):
        return 2.0 * sum(_hbm_bytes(x) for x in operands)
    if instruction.opcode in ("dynamic-slice", "gather", "slice"):
        return _hbm_bytes(instruction) + instruction.bytes * bool(_hbm_bytes(operands[0]))
    if instruction.opcode == "dynamic-update-slice":
        return 2.0 * operands[1].bytes * bool(_hbm_bytes(instruction))
    inner = [module.computations[name] for name in instruction.called("calls")]
    if instruction.opcode != "fusion" or not inner:
        return _hbm_bytes(instruction) + sum(_hbm_bytes(x) for x in operands)
    read = sum(_fusion_reads(inner[0], i, x) for i, x in enumerate(operands))
    return read + _fusion_writes(inner[0], instruction)


def _hbm_bytes(instruction: Instruction) -> float:
    return float(sum(array.bytes for array in instruction.arrays if array.space == 0))


def _fusion_reads(inner: Computation, number: int, operand: Instruction) -> float:
    whole = _hbm_bytes(operand)
    if not whole or number not in inner.parameters:
        return whole
    parts = 0.0
    for user, source in _real_users(inner, inner.parameters[number]):
        if user.opcode in ("dynamic-slice", "gather", "slice") and user.operands[0] == source:
            parts += user.bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == source:
            continue  # in place: the rest of the array is not touched
        else:
            return whole
    return min(parts, whole)


def _real_users(inner: Computation, value: Instruction) -> list[tuple[Instruction, str]]:
    """Lists the users of a value or of a view of it, each with the name of that operand."""
    found = []
    for user in inner.users[value.name]:
        found += _real_users(inner, user) if user.opcode in _VIEWS else [(user, value.name)]
    return found


def _fusion_writes(inner: Computation, instruction: Instruction) -> float:
    roots = [inner.root]
    if inner.root.opcode == "tuple":
        roots = [inner.instructions[name] for name in inner.root.operands]
    if len(roots) != len(instruction.arrays):
        return _hbm_bytes(instruction)
    written = 0.0
    for root, array in zip(roots, instruction.arrays):
        while root.opcode in _VIEWS and root.operands:
            root = inner.instructions[root.operands[0]]
        if array.space == 0:
            sliced = root.opcode == "dynamic-update-slice"
            written += inner.instructions[root.operands[1]].bytes if sliced else array.bytes
    return written
