"""Kernels of the model compile for every TPU that `model.attention=auto` gives them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from tiny_plan import needs_compiler

from clip_jax.models import attention_kernel, layer_norm
from clip_jax.plan.topology import parse_topology

pytestmark = needs_compiler
CHIPS = ["v5e:1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1"]


def compile_for(chip: str, function, *shapes) -> None:
    place = SingleDeviceSharding(parse_topology(chip).devices()[0])
    given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes]
    jax.jit(function).lower(*given).compile()


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("shape", [(8, 256, 1024), (4, 50, 768), (2, 1024, 1408), (2, 1024, 2048)])
def test_layer_norm(chip, shape):
    def gradients(x, row, y):
        constants = (row, row)
        results, backward = jax.vjp(
            lambda x, scale, bias: layer_norm._in_kernel(x, scale, bias, constants, 1e-5),
            x, row, row,
        )  # fmt: skip
        return results, backward((y, y))

    assert shape[1] * shape[2] <= layer_norm._LARGEST
    compile_for(chip, gradients, shape, shape[-1:], shape)


@pytest.mark.slow  # the longest takes minutes
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("heads", "d", "length"), [(8, 64, 256), (16, 72, 729), (8, 128, 1152)])
def test_attention(chip, heads, d, length):
    def gradients(projected, bias, y):
        out, backward = jax.vjp(
            lambda x, bias: attention_kernel.attend(attention_kernel.Projected(x, None), bias),
            projected, bias,
        )  # fmt: skip
        return out, backward(attention_kernel.Attended(y, None))

    shapes = (2, 3, heads, d, length), (3, heads, d), (2, heads, d, length)
    compile_for(chip, gradients, *shapes)
