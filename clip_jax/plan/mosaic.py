"""Reads and changes the grid of a Pallas kernel, in the form in which a compiled program holds it.

The form is the configuration of the custom call: JSON, with a module of Mosaic in it.
"""

import base64
import contextlib
import io
import json
import math
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def _module(config: str) -> Iterator[Any]:
    """Parses the module of a configuration."""
    from jaxlib.mlir import ir
    from jaxlib.mosaic.python import tpu

    with ir.Context() as context:
        context.allow_unregistered_dialects = True
        tpu.register_dialect(context)
        yield ir.Module.parse(base64.b64decode(json.loads(config)["custom_call_config"]["body"]))


def _entry(module: Any) -> Any:
    """Returns the function that runs for each turn of the grid; None: there is no grid."""
    functions = (x for x in module.body.operations if "iteration_bounds" in x.attributes)
    return next(functions, None)


def grid(config: str) -> list[int]:
    """Reads the bounds of the grid; empty: it has none."""
    with _module(config) as module:
        entry = _entry(module)
        return list(entry.attributes["iteration_bounds"]) if entry else []


def with_grid(config: str, bounds: list[int]) -> str:
    """Returns a configuration with other bounds of the grid, if it has one."""
    from jaxlib.mlir import ir

    fields = json.loads(config)
    with _module(config) as module:
        if entry := _entry(module):
            entry.attributes["iteration_bounds"] = ir.DenseI64ArrayAttr.get(bounds)
        buffer = io.BytesIO()
        module.operation.write_bytecode(buffer)
    fields["custom_call_config"]["body"] = base64.b64encode(buffer.getvalue()).decode()
    return json.dumps(fields)


def windows(config: str) -> list[tuple[list[int], int] | None]:
    """Reads the blocks in which a kernel takes its operands, and then those of its results.

    Returns:
      (shape, number of copies in a run over the grid) of each block. A block is copied anew where
      its index changes: as often as the dimensions run up to the last on which the index depends.
      None: the kernel copies that operand itself.
    """
    with _module(config) as module:
        entry = _entry(module)
        if not entry or "window_params" not in entry.attributes:
            return []
        functions = {str(x.attributes["sym_name"]): x for x in module.body.operations}
        bounds = list(entry.attributes["iteration_bounds"])
        found: list[tuple[list[int], int] | None] = []
        for window in entry.attributes["window_params"]:
            if "window_bounds" not in window:
                found.append(None)
                continue
            name = str(window["transform_indices"]).removeprefix("@")
            block = functions[f'"{name}"'].regions[0].blocks[0]
            *_, result = block.operations
            dims = {d for x in result.operands for d in _dims(x, len(bounds)) if bounds[d] > 1}
            copies = math.prod(bounds[: max(dims, default=-1) + 1])
            found.append((list(window["window_bounds"]), copies))
        return found


def operations(config: str) -> float:
    """Counts multiplications and additions of the matrix products in a run over the grid.

    Branches count as taken, and loops whose trip count is not constant as one iteration.
    """
    with _module(config) as module:
        entry = _entry(module)
        if not entry:
            return 0.0
        turns = math.prod(entry.attributes["iteration_bounds"])
        return turns * sum(_operations(block) for region in entry.regions for block in region)


def _operations(block: Any) -> float:
    from jaxlib.mlir import ir

    total = 0.0
    for operation in block.operations:
        name = operation.operation.name.rpartition(".")[2]
        if name == "matmul":
            left, right = (ir.ShapedType(x.type).shape for x in list(operation.operands)[:2])
            out = ir.ShapedType(operation.results[0].type).shape
            batch = math.prod(out[:-2])
            # Each of the three sizes of a product appears in two of the arrays.
            total += 2 * batch * math.sqrt(math.prod((*left, *right, *out)) / batch**3)
        inner = sum(_operations(x) for region in operation.regions for x in region)
        total += inner * (_trip_count(operation) if name == "for" else 1)
    return total


def _trip_count(loop: Any) -> int:
    """Returns the trip count of a loop between constants; 1: it is not constant."""
    from jaxlib.mlir import ir

    found = []
    for bound in list(loop.operands)[:3]:
        if isinstance(bound.owner, ir.Block) or "value" not in bound.owner.attributes:
            return 1
        found.append(ir.IntegerAttr(bound.owner.attributes["value"]).value)
    first, last, step = found
    return max(-(-(last - first) // step), 0)


def _dims(value: Any, rank: int) -> set[int]:
    """Returns the dimensions of a grid on which an index depends."""
    from jaxlib.mlir import ir

    if isinstance(value.owner, ir.Block):
        number = ir.BlockArgument(value).arg_number
        return {number} if number < rank else set(range(rank))  # numbers given at run time
    return {d for x in value.owner.operands for d in _dims(x, rank)}
