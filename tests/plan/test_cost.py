"""The planner's reading of compiled programs, against programs whose costs are known."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from clip_jax.plan import cost, flops, groups, hlo, loops, topology
from clip_jax.plan.network import Network
from clip_jax.training import step

MESH = {"data": 4, "fsdp": 2}
P = PartitionSpec


def stored(name: str) -> str:
    """Reads a short program, written by hand in the form of the TPU compiler's."""
    return (pathlib.Path(__file__).parent / "hlo" / f"{name}.txt").read_text()


def read(function, *shapes) -> hlo.Module:
    return hlo.parse_module(jax.jit(function).lower(*shapes).compile().as_text())


def network(shape: dict[str, int], name: str = "v5e:2x4") -> Network:
    """Lays the mesh over the slice in order."""
    slice_ = topology.parse_topology(name)
    return Network(slice_, shape, np.argwhere(np.ones(slice_.shape)))


def run_cost(function, *shapes, mesh=None) -> cost.Cost:
    return cost.program_cost(read(function, *shapes), network(mesh or MESH))


def zeros(*shape, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.fixture(scope="module")
def grid() -> jax.sharding.Mesh:
    return jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(AxisType.Auto,) * 2)


# ---- Shapes ------------------------------------------------------------------------------------


def test_shapes():
    text = "(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, s32[], (pred[<=4]{0}), u32[2]{0:S(2)})"
    arrays = hlo.parse_shape(text)
    assert [array.bytes for array in arrays] == [2048, 4, 4, 8]
    assert [array.space for array in arrays] == [1, 0, 0, 2]
    assert hlo.item_bytes("f8e4m3fn") == 1
    assert hlo.item_bytes("s4") == 1
    assert hlo.item_bytes("token") == 0


def test_instructions():
    line = (
        "  ROOT %fusion.1 = (f32[2]{0}, /*index=1*/s32[]) fusion(%a.1, %b), kind=kLoop, "
        'calls=%fused, metadata={op_name="jit(f)/x, y={1}" stack_frame_id=3}, '
        'backend_config={"window_config":{"estimated_cycles":"1234"}}'
    )
    module = hlo.parse_module(
        f"HloModule m, num_partitions=8\n\nENTRY %e () -> f32[] {{\n{line}\n}}"
    )
    root = module.entry.root
    assert module.partitions == 8
    assert (root.name, root.opcode, root.operands) == ("fusion.1", "fusion", ("a.1", "b"))
    assert root.called("calls") == ("fused",)
    assert root.op_name == "jit(f)/x, y={1}"
    assert root.cycles == 1234
    assert root.bytes == 12
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse_module("HloModule m\n")


def test_the_source_of_an_instruction():
    def inner(x):
        return x @ x

    module = read(lambda x: inner(x) + 1, zeros(64, 64))
    everything = [x for computation in module.computations.values() for x in computation]
    product = next(x for x in everything if x.opcode == "dot" or "dot_general" in x.op_name)
    calls = [function.rsplit(".", 1)[-1] for _, function in module.frames.stack(product)]
    assert calls[:2] == ["inner", "<lambda>"]
    assert module.frames.stack(product)[0][0].endswith("test_cost.py")


# ---- Operations --------------------------------------------------------------------------------


def test_operations_of_a_scanned_mlp():
    """Forward, backward with two products each, in a loop; recomputed where it says so."""
    layers, rows, width, hidden = 5, 16, 32, 64

    def loss(params, x, wrap):
        def layer(x, w):
            return jnp.tanh(x @ w[0]) @ w[1], None

        return jnp.sum(jax.lax.scan(wrap(layer), x, params)[0] ** 2)

    shapes = (zeros(layers, width, hidden), zeros(layers, hidden, width)), zeros(rows, width)
    product = 2 * rows * width * hidden
    gradient = jax.grad(loss, argnums=(0, 1))
    plain = run_cost(functools.partial(gradient, wrap=lambda f: f), *shapes)
    assert plain.flops == layers * 2 * 3 * product
    assert plain.open_loops == 0
    full = functools.partial(jax.checkpoint, prevent_cse=False)
    again = run_cost(functools.partial(gradient, wrap=full), *shapes)
    assert again.flops == layers * (2 * 3 + 1) * product  # the second product is not needed again


def test_operations_in_nested_loops_and_fusions():
    def inner(i, x):
        return jax.nn.relu(x @ x)

    def outer(x, _):
        return jax.lax.fori_loop(0, 4, inner, x), None

    total = run_cost(lambda x: jax.lax.scan(outer, x, None, length=3)[0], zeros(8, 8))
    assert total.flops == 3 * 4 * 2 * 8**3


def test_operations_of_batched_products():
    total = run_cost(
        lambda q, k: jnp.einsum("bsnh,btnh->bnst", q, k), zeros(2, 5, 3, 8), zeros(2, 7, 3, 8)
    )
    assert total.flops == 2 * (2 * 3 * 5 * 7 * 8)


# Products in the TPU compiler's form: a batch dimension is a spatial one with a single valid pair
# per output; and a real convolution, whose padding is not counted.
@pytest.mark.parametrize(
    ("line", "left", "right", "products"),
    [
        (
            "f32[64,32] convolution(%a, %b), dim_labels=bf_io->bf",
            "f32[64,16]",
            "f32[16,32]",
            64 * 32 * 16,
        ),
        (
            "f32[12,64,77] convolution(%a, %b), window={size=12 stride=11 pad=0_0 lhs_dilate=12}, "
            "dim_labels=0bf_0oi->0bf",
            "f32[12,64,32]",
            "f32[12,77,32]",
            12 * 64 * 77 * 32,
        ),
        (
            "f32[2,4,4,8] convolution(%a, %b), window={size=3x3 pad=1_1x1_1}, "
            "dim_labels=b01f_01io->b01f",
            "f32[2,4,4,6]",
            "f32[3,3,6,8]",
            2 * 8 * 6 * 10 * 10,  # of 4 x 3 positions along a side two meet the padding
        ),
        (
            "f32[2,4,4,6] convolution(%a, %b), window={size=3x3 pad=1_1x1_1}, "
            "dim_labels=b01f_01io->b01f, feature_group_count=6",
            "f32[2,4,4,6]",
            "f32[3,3,1,6]",
            2 * 6 * 10 * 10,
        ),
        (
            "f32[5,3,7] dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, "
            "rhs_batch_dims={0}, rhs_contracting_dims={1}",
            "f32[5,3,4]",
            "f32[5,4,7]",
            5 * 3 * 7 * 4,
        ),
    ],
)
def test_operations_of_single_instructions(line, left, right, products):
    text = f"ENTRY %e (a: x) -> y {{\n  %a = {left} parameter(0)\n  %b = {right} parameter(1)\n"
    entry = hlo.parse_module(f"{text}  ROOT %r = {line}\n}}").entry
    assert flops.matmul_flops(entry.root, entry) == 2 * products


def test_the_convolutions_of_a_resnet():
    """Counted from the compiled program and by XLA itself, which counts all else as well."""

    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    shapes = zeros(4, 15, 15, 8), zeros(3, 3, 8, 16)
    compiled = jax.jit(convolve).lower(*shapes).compile()
    found = cost.program_cost(hlo.parse_module(compiled.as_text()), network(MESH))
    assert found.flops == pytest.approx(compiled.cost_analysis()["flops"], rel=0.01)


def test_traffic_of_slices():
    """A loop that reads a layer of a stack reads the layer, not the stack."""
    layers, side = 16, 64
    stack = zeros(layers, side, side)
    total = run_cost(
        lambda x, w: jax.lax.scan(lambda x, w: (x + w, None), x, w)[0], zeros(side, side), stack
    )
    one = side * side * 4
    assert layers * 3 * one <= total.bytes <= (layers + 2) * 5 * one


# ---- Loops -------------------------------------------------------------------------------------

LOOP = """
%body (s: (s32[], s32[], f32[])) -> (s32[], s32[], f32[]) {{
  %s = (s32[], s32[], f32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %one = s32[] constant({step})
  %next = s32[] add(%i, %one)
  %n = s32[] get-tuple-element(%s), index=1
  %x = f32[] get-tuple-element(%s), index=2
  ROOT %t = (s32[], s32[], f32[]) tuple(%next, %n, %x)
}}

%test (s.1: (s32[], s32[], f32[])) -> pred[] {{
  %s.1 = (s32[], s32[], f32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %n.1 = s32[] get-tuple-element(%s.1), index=1
  ROOT %c = pred[] compare({compared}), direction={direction}
}}

ENTRY %e (x.1: f32[], m: s32[]) -> f32[] {{
  %x.1 = f32[] parameter(0)
  %m = s32[] parameter(1)
  %first = s32[] constant({first})
  %copied = s32[] copy(%first)
  %last = s32[] constant(10)
  %t.1 = (s32[], s32[], f32[]) tuple(%copied, %{last}, %x.1)
  %w = (s32[], s32[], f32[]) while(%t.1), condition=%test, body=%body
  ROOT %r = f32[] get-tuple-element(%w), index=2
}}
"""


@pytest.mark.parametrize(
    ("changes", "trips"),
    [
        ({}, 10),
        ({"first": 1, "step": 2}, 5),
        ({"direction": "LE"}, 11),
        ({"direction": "NE"}, 10),
        ({"direction": "GT", "compared": "%n.1, %i.1"}, 10),
        ({"first": 20, "step": -3, "direction": "GT"}, 4),
        ({"first": 11}, 0),
        ({"last": "m"}, None),
        ({"step": 0}, None),
    ],
)
def test_trip_count(changes, trips):
    settings = {"step": 1, "first": 0, "last": "last", "direction": "LT", "compared": "%i.1, %n.1"}
    module = hlo.parse_module(LOOP.format(**{**settings, **changes}))
    assert loops.trip_count(module.entry.instructions["w"], module.entry, module) == trips


def test_a_loop_whose_trip_count_depends_on_the_data_does_not_count():
    def run(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: x @ x, x @ x)

    total = run_cost(run, zeros(8, 8))
    assert total.open_loops == 1
    assert total.flops == 2 * 8**3  # of the product before it


def test_a_conditional_counts_as_its_cheapest_branch():
    def run(x, p):
        return jax.lax.cond(p, lambda x: jnp.sin(x @ x) @ x, lambda x: x, x) @ x

    total = run_cost(run, zeros(256, 256), zeros(dtype=jnp.bool_))
    assert total.flops == 2 * 256**3
    assert len(total.branches) == 1
    assert total.branches[0][0] < total.branches[0][1]


def test_an_update_that_may_be_skipped_counts_in_full():
    def run(x, p):
        with jax.named_scope(step.SKIPPABLE):
            return jax.lax.cond(p, lambda x: jnp.sin(x @ x) @ x, lambda x: x, x) @ x

    total = run_cost(run, zeros(256, 256), zeros(dtype=jnp.bool_))
    assert total.flops == 3 * 2 * 256**3
    assert not total.branches


# ---- Collectives -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("to_apply=%add", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, dimensions={0}", [[0, 2], [1, 3]]),
        (
            "replica_groups=mesh['x'=2,'y'=1,'z'=2], device_ids=([2,2]T(1,0)) {'x'}",
            [[0, 1], [2, 3]],
        ),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
    ],
)
def test_groups(attributes, expected):
    text = f"ENTRY %e (a: x) -> y {{\n  ROOT %a = f32[4] all-gather(), {attributes}\n}}"
    root = hlo.parse_module(text).entry.root
    found = groups.device_groups(root, 4).tolist()
    assert sorted(map(sorted, found)) == expected


def test_axes_crossed():
    ids = np.arange(8).reshape(4, 2)
    assert groups.axes_crossed(ids, MESH) == ("fsdp",)
    assert groups.axes_crossed(ids.T, MESH) == ("data",)
    assert groups.axes_crossed(ids.reshape(1, 8), MESH) == ("data", "fsdp")
    assert groups.axes_crossed(ids, {"slice": 2, "data": 2, "fsdp": 2}) == ("fsdp",)


def exchanges(grid, function, *specs_and_shapes) -> dict[tuple[str, str], tuple[float, float]]:
    """Returns (number, bytes) by (kind, axes), of a function that shard_map runs."""
    specs = tuple(spec for spec, _ in specs_and_shapes)
    mapped = jax.shard_map(function, mesh=grid, in_specs=specs, out_specs=P(), check_vma=False)
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(grid, spec))
        for spec, shape in specs_and_shapes
    ]
    rows = cost.by_exchange(run_cost(mapped, *shapes))
    assert all(kind.network == "ici" for kind, *_ in rows)
    assert all(seconds > 0 for *_, seconds in rows)
    return {(x.kind, x.axes): (count, size) for x, count, size, _ in rows}


def test_collectives_of_a_written_program(grid):
    """Number, bytes and axes of every kind, three of them in a loop of five iterations."""
    part = 16 * 4  # bytes of the array of a device

    def run(x):
        def body(x, _):
            whole = jax.lax.all_gather(x, "fsdp", tiled=True)
            x = jax.lax.psum_scatter(jnp.sin(whole), "fsdp", tiled=True)
            return jax.lax.ppermute(x, "data", [(i, (i + 1) % 4) for i in range(4)]), None

        x, _ = jax.lax.scan(body, x, None, length=5)
        x = jax.lax.all_to_all(x.reshape(4, 4), "data", 0, 0).reshape(-1)
        return jax.lax.psum(jnp.cos(x), ("data", "fsdp"))

    found = exchanges(grid, run, (P(("data", "fsdp")), (128,)))
    assert found == {
        ("all-gather", "fsdp"): (5, 5 * 2 * part),
        ("reduce-scatter", "fsdp"): (5, 5 * 2 * part),
        ("collective-permute", "data"): (5, 5 * part),
        ("all-to-all", "data"): (1, part),
        ("all-reduce", "data+fsdp"): (1, part),
    }


def test_collectives_that_the_partitioner_adds(grid):
    """A sum over the batch, and the weights gathered for it, each over its own axis."""
    by_batch, by_row = NamedSharding(grid, P("data")), NamedSharding(grid, P("fsdp"))
    weights = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=by_row)
    batch = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=by_batch)

    def loss(w, x):
        w = jax.lax.with_sharding_constraint(w, NamedSharding(grid, P()))
        return jnp.sum(jnp.tanh(x @ w))

    total = run_cost(jax.grad(loss), weights, batch)
    found = {(what.kind, what.axes): size for what, _, size, _ in cost.by_exchange(total)}
    assert found[("all-gather", "fsdp")] == 64 * 32 * 4
    assert ("all-reduce", "data") in found


@pytest.mark.parametrize("cycles", [1500, 1_500_000])
def test_a_collective_beside_computation(cycles):
    """An asynchronous collective in the TPU compiler's form counts once."""
    module = hlo.parse_module(stored("async_all_gather").replace("CYCLES", str(cycles)))
    total = cost.program_cost(module, network({"data": 4}, "v5e:2x2"))
    ((what, count, size, seconds),) = cost.by_exchange(total)
    assert (what.kind, what.axes, what.overlapped) == ("all-gather", "data", True)
    assert (count, size) == (1, 4096 * 4)
    assert total.flops == 2 * 64**3
    assert total.compute_seconds == pytest.approx(cycles / 1.5e9)
    assert total.elapsed == pytest.approx(max(cycles / 1.5e9, seconds))


def test_exchanges_between_slices():
    """The program of one slice sends to the others and receives from them."""
    slices = topology.parse_topology("v5e:2x2", slices=2)
    places = np.argwhere(np.ones(slices.shape))
    total = cost.program_cost(
        hlo.parse_module(stored("between_slices")), Network(slices, {"slice": 1, "data": 4}, places)
    )
    ((what, count, size, seconds),) = cost.by_exchange(total)
    assert (what.kind, what.axes, what.network) == ("all-reduce", "slice", "dcn")
    assert (count, size) == (1, 4096)
    assert total.elapsed == seconds > 4096 / slices.chip.dcn


def test_a_kernel_counts_as_it_declares():
    text = """ENTRY %e (a: f32[8]) -> f32[8] {
  %a = f32[8] parameter(0)
  ROOT %k = f32[8] custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"""
    cost_text = '"cost_estimate":{"flops":"985000000","transcendentals":"7","bytes_accessed":"64"}'
    total = text_cost(text + f'"custom_call_config":{{"body":"eA==",{cost_text}}}}}\n}}')
    assert total.flops == 985e6
    assert total.compute_seconds == pytest.approx(1e-5)  # at half the peak of 197 TFLOP/s
    assert total.ops[0].kernel
    silent = text_cost(text + '"custom_call_config":{"body":"eA=="}}\n}')
    assert (silent.flops, silent.bytes) == (0, 64)


def text_cost(text: str) -> cost.Cost:
    return cost.program_cost(hlo.parse_module(text), network(MESH))
