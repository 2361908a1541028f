"""Both towers as ONNX, for any batch size; weights inside, or beside it where they are large.

The conversion is that of jax2onnx. It gets the operations of JAX alone, all that does not depend on
the input computed beforehand: runtimes need not cut up the stacked weights of the layers, nor
select between booleans to make a causal mask, which onnxruntime cannot.
"""

import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core
from flax import traverse_util

from clip_jax import models
from clip_jax.errors import UserError
from clip_jax.export.layout import ONNX, TOWERS
from clip_jax.export.stablehlo import batch
from clip_jax.weights.base import Weights, read_finite

# Operations that only call a function, and the parameter that holds it.
_CALLS = {"jit": "jaxpr", "remat2": "jaxpr", "custom_jvp_call": "call_jaxpr"}


def write(weights: Weights, folder: pathlib.Path) -> None:
    """Writes a file for each tower; computes in float32.

    Raises:
      UserError: jax2onnx is not installed.
    """
    to_onnx = _converter()
    # Unrolled, each layer is a few ordinary operations; a Scan would hide them from optimisers.
    net = models.CLIP(weights.size, scan_layers=False)
    arrays = {name: read_finite(weights.tensors, name) for name in weights.tensors.shapes}
    variables = traverse_util.unflatten_dict(arrays, sep="/")
    folder.mkdir(parents=True, exist_ok=True)
    for tower in TOWERS:
        rows = batch(weights.size, tower)
        traced = jax.make_jaxpr(lambda x: net.apply(variables, x, method=tower))(rows)  # noqa: B023
        to_onnx(
            lambda x: _evaluate(traced.jaxpr, traced.consts, [x])[0],  # noqa: B023
            [rows],
            model_name=tower,
            return_mode="file",
            output_path=str(folder / f"{tower}{ONNX}"),
        )


def _converter() -> Callable[..., Any]:
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # warns of each shape it leaves out
    try:
        from jax2onnx import to_onnx  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise UserError(
            f"--format=onnx needs jax2onnx ({error}): pip install -r requirements-export.txt."
        ) from error
    return to_onnx


def _evaluate(jaxpr: Any, constants: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """Runs traced operations; those whose inputs and shapes are all known, at once."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs]))

    def read(variable: Any) -> Any:
        if isinstance(variable, jax.extend.core.Literal):
            return variable.val
        return values[variable]

    for eqn in jaxpr.eqns:
        values.update(zip(eqn.outvars, _outputs(eqn, [read(v) for v in eqn.invars])))
    return [read(variable) for variable in jaxpr.outvars]


def _outputs(eqn: Any, inputs: list[Any]) -> list[Any]:
    if eqn.primitive.name in _CALLS:
        inner = eqn.params[_CALLS[eqn.primitive.name]]
        return _evaluate(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs)
    if _is_known(eqn, inputs):
        with jax.ensure_compile_time_eval():
            found = eqn.primitive.bind(*inputs, **eqn.params)
    else:
        found = eqn.primitive.bind(*inputs, **eqn.params)
    return found if eqn.primitive.multiple_results else [found]


def _is_known(eqn: Any, inputs: list[Any]) -> bool:
    """Whether neither a value nor a shape waits for the input; the batch is no number yet."""
    sizes = [size for variable in eqn.outvars for size in variable.aval.shape]
    return all(isinstance(size, int) for size in sizes) and not any(
        isinstance(value, jax.core.Tracer) for value in inputs
    )
