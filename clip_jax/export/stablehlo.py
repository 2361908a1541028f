"""Both towers as serialised StableHLO, for any batch size, on CPU, NVIDIA GPU and TPU.

The weights are arguments of the programs and lie beside them in model.safetensors: a serialised
program cannot hold more than 2 GiB, and in one file they serve both programs and `clip_jax.load`.
"""

import pathlib
from collections.abc import Mapping
from typing import cast

import jax
import jax.export
import jax.numpy as jnp
from flax import traverse_util

from clip_jax import models
from clip_jax.export.layout import STABLEHLO, TOWERS
from clip_jax.weights.base import Weights, variable_shapes, write_folder

PLATFORMS = ("cpu", "cuda", "tpu")


def write(weights: Weights, folder: pathlib.Path) -> None:
    """Writes the weights, and one program for each tower; computes in float32."""
    write_folder(weights, folder)
    for tower in TOWERS:
        program = export_tower(weights.size, tower)
        (folder / f"{tower}{STABLEHLO}").write_bytes(bytes(program.serialize()))


def export_tower(size: models.Size, tower: str) -> jax.export.Exported:
    """A function of all weights by name (float32) and a batch of any size.

    Args:
      size: of the model.
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
    return jax.export.export(jax.jit(run), platforms=PLATFORMS)(weights, batch(size, tower))


def batch(size: models.Size, tower: str) -> jax.ShapeDtypeStruct:
    """What a tower takes, the number of rows left open."""
    (rows,) = jax.export.symbolic_shape("b")
    if tower == "encode_text":
        return jax.ShapeDtypeStruct((rows, size.context_length), jnp.int32)
    return jax.ShapeDtypeStruct((rows, size.image_size, size.image_size, 3), jnp.uint8)
