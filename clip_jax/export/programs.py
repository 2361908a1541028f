"""Both towers as programs for any batch size: serialised StableHLO, or ONNX.

StableHLO runs on CPU, NVIDIA GPU and TPU. The weights are arguments of its programs and lie beside
them in model.safetensors: a serialised program cannot hold more than 2 GiB, and in one file they
serve both programs and `clip_jax.load`.

In ONNX the weights are inside, or beside it where they are large. The conversion is jax2onnx's. It
gets primitive operations of JAX alone, and everything that does not depend on the input is computed
beforehand: runtimes need not slice the stacked weights of the layers, nor select between booleans
to make a causal mask, which onnxruntime cannot.
"""

import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.export
import jax.extend.core
import jax.numpy as jnp
from flax import traverse_util

from clip_jax import models
from clip_jax.errors import UserError
from clip_jax.export.runtime import STABLEHLO, TOWERS
from clip_jax.weights import folder as weights_folder
from clip_jax.weights.model import Weights, read_finite, variable_shapes

ONNX = ".onnx"
PLATFORMS = ("cpu", "cuda", "tpu")
# Operations that only call a function, and the parameter that holds it.
_CALLS = {"jit": "jaxpr", "remat2": "jaxpr", "custom_jvp_call": "call_jaxpr"}


def write_stablehlo(weights: Weights, folder: pathlib.Path) -> None:
    """Writes the weights, and one program for each tower; computes in float32."""
    weights_folder.write(weights, folder)
    for tower in TOWERS:
        program = export_tower(weights.size, tower)
        (folder / f"{tower}{STABLEHLO}").write_bytes(bytes(program.serialize()))


def export_tower(size: models.Size, tower: str) -> jax.export.Exported:
    """Exports a function of all weights by name (float32) and a batch of any size.

    Args:
      size: shapes and forms of the model.
      tower: "encode_image", which takes uint8 [b, image_size, image_size, 3], or "encode_text",
        which takes int32 [b, context_length].

    Returns:
      The program; its result is float32 [b, embed_dim], L2-normalised.
    """
    net = models.CLIP(size)

    def run(weights: Mapping[str, jax.Array], rows: jax.Array) -> jax.Array:
        variables = traverse_util.unflatten_dict(weights, sep="/")
        return cast(jax.Array, net.apply(variables, rows, method=tower))

    shapes = variable_shapes(size)
    weights = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
    return jax.export.export(jax.jit(run), platforms=PLATFORMS)(weights, input_batch(size, tower))


def input_batch(size: models.Size, tower: str) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype that a tower takes, with a symbolic number of rows."""
    (rows,) = jax.export.symbolic_shape("b")
    if tower == "encode_text":
        return jax.ShapeDtypeStruct((rows, size.context_length), jnp.int32)
    return jax.ShapeDtypeStruct((rows, size.image_size, size.image_size, 3), jnp.uint8)


# ---- ONNX --------------------------------------------------------------------------------------


def write_onnx(weights: Weights, folder: pathlib.Path) -> None:
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
        rows = input_batch(weights.size, tower)
        traced = jax.make_jaxpr(lambda x: net.apply(variables, x, method=tower))(rows)  # noqa: B023
        to_onnx(
            lambda x: _evaluate(traced.jaxpr, traced.consts, [x])[0],  # noqa: B023
            [rows],
            model_name=tower,
            return_mode="file",
            output_path=str(folder / f"{tower}{ONNX}"),
        )


def _converter() -> Callable[..., Any]:
    # One warns of each shape it leaves out, the other, with a traceback, of each operation that it
    # cannot convert for lack of a package; where the model has one of these, `to_onnx` raises.
    for name in ("onnx_ir", "jax2onnx.plugins.plugin_system"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        from jax2onnx import to_onnx  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise UserError(
            f"--format=onnx needs jax2onnx ({error}): pip install -r requirements-export.txt."
        ) from error
    return to_onnx


def _evaluate(jaxpr: Any, constants: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """Runs traced operations; those whose inputs and shapes are all known, immediately."""
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
            outputs = eqn.primitive.bind(*inputs, **eqn.params)
    else:
        outputs = eqn.primitive.bind(*inputs, **eqn.params)
    return outputs if eqn.primitive.multiple_results else [outputs]


def _is_known(eqn: Any, inputs: list[Any]) -> bool:
    """Returns whether no value and no shape depends on the input, whose batch is symbolic."""
    sizes = [size for variable in eqn.outvars for size in variable.aval.shape]
    return all(isinstance(size, int) for size in sizes) and not any(
        isinstance(value, jax.core.Tracer) for value in inputs
    )
