"""The times of Pallas kernels, against XLA's own of the same computation and the chip's rates."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from tiny_plan import needs_compiler

from clip_jax.plan import cost, hlo, kernels, mosaic, topology
from clip_jax.plan.network import Network

V5E = topology.parse_topology("v5e:1x1")
PEAK, BANDWIDTH, CLOCK = 197e12, 819e9, 1.5e9


def product(x, w, block=512):
    """Multiplies matrices in a kernel; each turn of the grid multiplies all of two strips."""

    def kernel(x, w, out):
        out[...] = jnp.dot(x[...], w[...], preferred_element_type=jnp.float32).astype(out.dtype)

    return pl.pallas_call(
        kernel,
        grid=(x.shape[0] // block, w.shape[1] // block),
        in_specs=[
            pl.BlockSpec((block, x.shape[1]), lambda i, j: (i, 0)),
            pl.BlockSpec((w.shape[0], block), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((block, block), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype),
        name="product",
    )(x, w)


def doubled(x, block=256):
    def kernel(x, out):
        out[...] = x[...] * 2

    spec = pl.BlockSpec((block, x.shape[1]), lambda i: (i, 0))
    return pl.pallas_call(
        kernel,
        grid=(x.shape[0] // block,),
        in_specs=[spec],
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        name="doubled",
    )(x)


def compiled(function, *shapes, dtype=jnp.bfloat16) -> hlo.Module:
    sharding = SingleDeviceSharding(V5E.devices()[0])
    given = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape in shapes]
    return hlo.parse_module(jax.jit(function).lower(*given).compile().as_text())


def timed(function, *shapes, dtype=jnp.bfloat16) -> kernels.Timing:
    (timing,) = kernels.time_kernels(compiled(function, *shapes, dtype=dtype), V5E).values()
    return timing


# ---- By the compiler ---------------------------------------------------------------------------


@needs_compiler
@pytest.mark.slow
def test_a_product_takes_as_long_as_xlas():
    """Bound by the matrix units, which are busy for longer than there are bundles."""
    shapes = (2048, 1024), (1024, 2048)
    timing = timed(product, *shapes)
    module = compiled(lambda x, w: x @ w, *shapes)
    xla = sum(x.cycles or 0 for x in module.entry)
    least = 2 * 2048 * 1024 * 2048 / PEAK * CLOCK
    assert timing.simulated
    assert least < timing.cycles < 1.25 * least
    assert timing.cycles == pytest.approx(xla, rel=0.15)
    assert timing.bundles < timing.cycles
    assert timing.flops == 2 * 2048 * 1024 * 2048
    # The left matrix is read once, the right one once for each of four rows of blocks.
    assert timing.bytes == 2 * (2048 * 1024 + 4 * 1024 * 2048 + 2048 * 2048)
    assert max(timing.slots, key=timing.slots.get) in ("MATMUL", "MXU")


@needs_compiler
@pytest.mark.slow
def test_a_copy_takes_as_long_as_xlas():
    """Bound by HBM, which the simulation takes for two networks, one each way."""
    shape = 64 * 256, 2048
    module = compiled(doubled, shape, dtype=jnp.float32)
    network = Network(V5E, {"data": 1}, np.zeros((1, 2), int))
    total = cost.program_cost(module, network, kernels.time_kernels(module, V5E))
    xla = sum(x.cycles or 0 for x in compiled(lambda x: x * 2, shape, dtype=jnp.float32).entry)
    least = 2 * 4 * np.prod(shape) / BANDWIDTH
    assert least < total.elapsed < 1.5 * least
    assert total.elapsed == pytest.approx(xla / CLOCK, rel=0.1)


@needs_compiler
@pytest.mark.slow
def test_kernels_of_a_sharded_scan_and_its_gradient():
    """Each chip multiplies its rows, once a layer; the gradient's kernels count as well."""
    chips = topology.parse_topology("v5e:2x2")
    mesh = Mesh(np.array(chips.devices()), ("data",), axis_types=(AxisType.Auto,))
    layers, rows, width = 3, 4 * 512, 512

    @jax.custom_vjp
    def multiply(x, w):
        return product(x, w)

    multiply.defvjp(
        lambda x, w: (product(x, w), (x, w)),
        lambda kept, g: (product(g, kept[1].T), product(kept[0].T, g)),
    )

    def loss(ws, x):
        def layer(x, w):
            return multiply(jnp.tanh(x), w), None

        return jnp.sum(jax.lax.scan(layer, x, ws)[0].astype(jnp.float32))

    def gradient(ws, x):
        return jax.lax.psum(jax.grad(loss)(ws, x), "data")

    mapped = jax.shard_map(
        gradient,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    shapes = (layers, width, width), (rows, width)
    specs = PartitionSpec(), PartitionSpec("data")
    given = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs)
    ]
    module = hlo.parse_module(jax.jit(mapped).lower(*given).compile().as_text())
    timings = kernels.time_kernels(module, chips)
    network = Network.of(mesh, chips, module.partitions)
    total = cost.program_cost(module, network, timings)
    found = [op for op in total.ops if op.kernel]
    assert sum(op.times for op in found) == 3 * layers
    least = 2 * (rows // 4) * width * width / PEAK
    for op in found:
        timing = timings[op.kernel.name]
        assert timing.simulated
        assert op.seconds == pytest.approx(op.times * timing.cycles / CLOCK)
        assert op.times * least < op.seconds < 2 * op.times * least


@needs_compiler
def test_a_kernel_that_does_not_compile_alone(monkeypatch):
    """A kernel without a time counts as it declares, and the reason is kept."""
    monkeypatch.setattr(mosaic, "grid", lambda config: [4])
    text = """ENTRY %e (a: f32[8]) -> f32[8] {
  %a = f32[8] parameter(0)
  ROOT %k = f32[8] custom-call(%a), custom_call_target="tpu_custom_call", backend_config="""
    module = hlo.parse_module(text + '{"custom_call_config":{"body":"eA=="}}\n}')
    (timing,) = kernels.time_kernels(module, V5E).values()
    assert timing.cycles is None
    assert timing.reason


# ---- What libtpu writes ------------------------------------------------------------------------

SCHEDULE = """= control target key start
LH: loop header
= control target key end

     0   :  { %s1 = smov.u32 0 }
   0x1   :  { %s2 = smov.u32 0 }
   0x2 LB: > { %s3 = sphi %s1, %s9 }
   0x3   : > { %s4 = sadd.s32 1, %s3 }
   0x4 LB: > > { %s5 = sphi %s4, %s6 }
   0x5   : > > { %p1 = scmp.ge.s32.totalorder %s5, 3 /* loop exit test */ }
   0x6 PF: > { %s9 = sadd.s32 1, %s3 }
   0x7   : > { %p2 = scmp.ge.s32.totalorder %s9, 10 /* loop exit test */  ;;  %1 = sbr.rel target }
   0x8   :  {} /* End region 0 */
"""


def test_bundles_of_nested_loops():
    assert kernels.scheduled_bundles(SCHEDULE) == 3 + 10 * (4 + 3 * 2)
    assert kernels.scheduled_bundles(re.sub(r"/\*.*?\*/", "", SCHEDULE)) == 9


def test_slots():
    text = "== CAPACITY:\nMATMUL, VALU\n    4     2\n== UTILIZATION:\n4 0\n0 1\n"
    assert kernels.slot_usage(text) == {"MATMUL": 0.5, "VALU": 0.25}
    assert kernels.slot_usage("") == {}


def test_a_large_grid_is_simulated_in_two_parts():
    for bounds in ([128, 16], [2048], [4, 4096], [8, 3, 8, 1], [7, 50, 3]):
        small, large = kernels.parts_of_grid(bounds)
        assert all(a <= b <= c for a, b, c in zip(small, large, bounds))
        assert 2 * np.prod(small) == np.prod(large) < np.prod(bounds)
        assert np.prod(large) <= 256
    for bounds in ([8, 8], [1], [64], []):
        assert kernels.parts_of_grid(bounds) == [bounds]


def test_the_other_turns_take_as_long():
    def timing(cycles, bundles, simulated=True):
        return kernels.Timing(cycles, simulated, bundles, {})

    parts = [(32, timing(1000.0, 600.0)), (64, timing(1900.0, 1100.0))]
    found = kernels.extrapolate(parts, 128)
    assert (found.cycles, found.bundles) == (1000 + 3 * 900, 600 + 3 * 500)
    assert kernels.extrapolate(parts[:1], 32).cycles == 1000
    ended = kernels.extrapolate([parts[0], (64, timing(None, None, False))], 64)
    assert (ended.simulated, ended.cycles) == (True, 2000)
