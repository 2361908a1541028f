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


def _dims(value: Any, rank: int) -> set[int]:
    """Returns the dimensions of a grid on which an index depends."""
    from jaxlib.mlir import ir

    if isinstance(value.owner, ir.Block):
        number = ir.BlockArgument(value).arg_number
        return {number} if number < rank else set(range(rank))  # numbers given at run time
    return {d for x in value.owner.operands for d in _dims(x, rank)}
