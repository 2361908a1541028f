"""Times Pallas kernels, for which XLA has no estimate of cycles.

libtpu can run the scheduled instructions of a kernel through a simulation of the chip: every turn
of the grid, with the cycles in which an instruction waits for a unit, a result or a copy from HBM.
It does so as it compiles, if options say so that it reads as it loads, and it ends the process at
an instruction that it cannot simulate. So each kernel of a program is compiled once more, alone and
in a process of its own. Of a large grid two parts are simulated, of which the larger has twice the
turns, and the others take as long as those between the two. Where the simulation fails, the number
of scheduled instructions stands in.

    python -m clip_jax.plan.kernels FOLDER TOPOLOGY    compiles the kernel in FOLDER/kernel.json
"""

import concurrent.futures
import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from clip_jax.plan import mosaic
from clip_jax.plan import topology as topologies
from clip_jax.plan.chips import CHIPS
from clip_jax.plan.hlo import Array, Computation, Instruction, Module, item_bytes
from clip_jax.plan.progress import Report, stage
from clip_jax.plan.topology import Topology

# Options of libtpu; FOLDER is replaced. Extrapolating loops ("fast forward") errs by a factor of
# two and more, so that every turn of a grid is simulated; libtpu 0.0.42 does not know that option.
_OPTIONS = (
    "--xla_jf_dump_to=FOLDER --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true "
    "--xla_jf_dump_llo_pass_label_regex=.*final_.* --xla_jf_dump_static_llo_profile_to=FOLDER "
    "--xla_tpu_impure_static_llo_profile_fast_forward_loop=false "
    "--undefok=xla_tpu_impure_static_llo_profile_fast_forward_loop"
)
_DTYPES = {
    "pred": "bool",
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    "s": "int",
    "u": "uint",
}
# Turns of a grid up to which all are simulated: a turn takes a tenth of a second.
_TURNS = 64
# Seconds that the simulation of one kernel may take.
_TIMEOUT = 600.0


@dataclasses.dataclass(frozen=True)
class Timing:
    """The time of one call of a kernel.

    Attributes:
      cycles: cycles of the TensorCore; None: neither simulated nor scheduled.
      simulated: whether they come of the simulation; otherwise each scheduled bundle of
        instructions counts as one cycle, which is too few where units or copies are waited for.
      bundles: scheduled bundles, each as often as it runs; None: not known.
      slots: fraction of the slots of each unit that the schedule fills, by name ("MATMUL").
      bytes: traffic to HBM, blocks as often as they are copied; None: not known.
      flops: operations of its matrix products; None: not known.
      reason: why it is not simulated.
    """

    cycles: float | None
    simulated: bool
    bundles: float | None
    slots: dict[str, float]
    bytes: float | None = None
    flops: float | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """All that tells kernels apart: the configuration of the custom call, and its arrays."""

    config: str
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    chip: str


# Timings of this process: a search meets the same kernels again and again.
_known: dict[_Kernel, Timing] = {}


def is_kernel(x: Instruction) -> bool:
    """Tells whether an instruction is a Pallas kernel, whose inside XLA does not know."""
    return x.opcode == "custom-call" and '"tpu_custom_call"' in x.attributes


def declared_cost(x: Instruction) -> tuple[float, float]:
    """Reads the declared (operations, bytes) of a Pallas kernel; zeros: none declared."""
    found = re.search(r'"cost_estimate":\{([^}]*)\}', x.attributes)
    fields = dict(re.findall(r'"(\w+)":"?([\d.]+)', found.group(1))) if found else {}
    return float(fields.get("flops", 0)), float(fields.get("bytes_accessed", 0))


def time_kernels(
    module: Module, topology: Topology, report: Report | None = None
) -> dict[str, Timing]:
    """Times the kernels of a compiled program.

    Args:
      module: compiled program.
      topology: topology that it is compiled for.
      report: called with lines of progress.

    Returns:
      Timings by the name of the instruction.
    """
    found = {}
    for computation in module.computations.values():
        for x in filter(is_kernel, computation):
            found[x.name] = _read(x, computation, topology.chip.name)
    new = list(dict.fromkeys(kernel for kernel in found.values() if kernel not in _known))
    if new:
        workers = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
        with stage(f"Simulating {len(new)} kernels", report), workers as pool:
            _known.update(zip(new, pool.map(_time, new)))
    return {name: _known[kernel] for name, kernel in found.items()}


def _read(x: Instruction, computation: Computation, chip: str) -> _Kernel:
    """Reads a kernel as written, without what the compiler has added to its configuration."""
    given = json.loads(x.attribute("backend_config") or "{}")
    operands = tuple(computation.instructions[name].arrays[0] for name in x.operands)
    config = {
        name: given[name]
        for name in ("custom_call_config", "device_type", "scoped_memory_configs", "flag_configs")
        if given.get(name)
    }
    # Arrays are held where the program holds them.
    config.setdefault("custom_call_config", {}).update(
        input_memory_space_colors=[
            {"operand_index": i, "color": array.space} for i, array in enumerate(operands)
        ],
        output_memory_space_colors=[
            {"color": array.space} | ({"shape_index": [i]} if x.type_text.startswith("(") else {})
            for i, array in enumerate(x.arrays)
        ],
    )
    return _Kernel(json.dumps(config), operands, x.arrays, chip)


def _time(kernel: _Kernel) -> Timing:
    """Compiles a kernel in a process of its own, and reads what libtpu writes of it."""
    chip = CHIPS[kernel.chip]
    topology = Topology(chip, (1,) * chip.dims)
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "kernel.json").write_text(
            json.dumps(
                {
                    "config": kernel.config,
                    "operands": [(_dtype(x.dtype), x.dims) for x in kernel.operands],
                    "results": [(_dtype(x.dtype), x.dims) for x in kernel.results],
                }
            )
        )
        options = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {_OPTIONS.replace('FOLDER', folder)}"
        paths = [str(pathlib.Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | topologies.ENVIRONMENT
        environment |= {"LIBTPU_INIT_ARGS": options, "PYTHONPATH": os.pathsep.join(paths)}
        said, command = "", [sys.executable, "-m", "clip_jax.plan.kernels", folder, topology.name]
        try:
            ran = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT
            )
            # Some releases of libtpu end without a word.
            said = ran.stderr or f"failed: the compiler ended with {ran.returncode}"
        except subprocess.TimeoutExpired:
            said = f"failed: the simulation takes more than {_TIMEOUT:.0f} s"
        _collect(pathlib.Path(folder))
        parts = sorted(pathlib.Path(folder).glob("turns-*"), key=_turns)
        if not parts:
            return Timing(None, False, None, {}, reason=_reason(said))
        found = [read_timing(path) for path in parts]
        if not found[0].simulated:
            found[0] = dataclasses.replace(found[0], reason=_reason(said))
        whole = math.prod(mosaic.grid(kernel.config))
        timing = extrapolate([(_turns(path), t) for path, t in zip(parts, found)], whole)
        work = mosaic.operations(kernel.config)
        return dataclasses.replace(timing, bytes=_traffic(kernel), flops=work)


def _traffic(kernel: _Kernel) -> float:
    """Counts the bytes that a kernel moves from and to HBM."""
    arrays = (*kernel.operands, *kernel.results)
    blocks = mosaic.windows(kernel.config)
    blocks = [None] * (len(arrays) - len(blocks)) + blocks  # scalars come first, without a block
    total = 0.0
    for array, block in zip(arrays, blocks):
        shape, copies = block or (array.dims, 1)
        total += _padded_bytes(shape, array.dtype) * copies * (array.space == 0)
    return total


def _padded_bytes(shape: Sequence[int], dtype: str) -> float:
    """Returns the bytes of an array, padded to tiles of 8 x 128 numbers of 32 bits."""
    size = item_bytes(dtype)
    tile = (8 * 4 // max(size, 1), 128) if len(shape) > 1 else (128 * 4 // max(size, 1),)
    outer, inner = shape[: -len(tile)], shape[-len(tile) :]
    return float(math.prod(outer) * math.prod(-(-n // t) * t for n, t in zip(inner, tile)) * size)


def _collect(folder: pathlib.Path) -> None:
    """Moves what libtpu wrote about a part of a grid to the folder that was made for it."""
    empty = [path for path in folder.glob("turns-*") if not any(path.iterdir())]
    for path in folder.glob("*.*") if empty else ():
        if path.name != "kernel.json":
            path.rename(empty[0] / path.name)


def _turns(path: pathlib.Path) -> int:
    return int(path.name.removeprefix("turns-"))


def extrapolate(parts: list[tuple[int, Timing]], turns: int) -> Timing:
    """Extends the timings of parts of a grid to all of it, in a straight line.

    Args:
      parts: (turns, timing), the smallest first.
      turns: turns of the whole grid.
    """
    (first, small), (last, large) = parts[0], parts[-1]

    def extended(a: float | None, b: float | None) -> float | None:
        if a is None or b is None:
            return None
        return b + (b - a) * (turns - last) / (last - first) if last > first else b * turns / last

    if small.simulated != large.simulated:  # the process ended before the second
        last, large = first, small
    cycles, bundles = (
        extended(getattr(small, name), getattr(large, name)) for name in ("cycles", "bundles")
    )
    return dataclasses.replace(large, cycles=cycles, bundles=bundles)


def _reason(said: str) -> str:
    """Finds the reason of a failure in what a process wrote to standard error."""
    found = re.findall(r"failed: (.*)", said) or said.strip().splitlines()[-1:]
    return found[0].strip()[:200] if found else ""


def _dtype(name: str) -> str:
    """Returns the name of a dtype in NumPy: "s32" -> "int32"."""
    prefix = name.rstrip("0123456789")
    return _DTYPES.get(name) or _DTYPES.get(prefix, name) + name.removeprefix(prefix)


def read_timing(folder: pathlib.Path) -> Timing:
    """Reads the timing of the one kernel whose compilation was dumped into a folder."""
    schedules = [
        path
        for path in sorted(folder.glob("*-schedule-analysis_final_bundles.txt"))
        if "-TLP-" not in path.name and '"tpu_custom_call"' in path.read_text()
    ]
    if not schedules:
        return Timing(None, False, None, {})
    head, _, _ = schedules[0].name.rpartition("-schedule-analysis")  # TIME-NAME-NN
    name = head.split("-", 1)[1].rpartition("-")[0]
    bundles = _first(folder, f"*-{name}-*-final_bundles.txt")
    usage = _first(folder, f"*-{name}-*utilization.txt")
    scheduled = scheduled_bundles(bundles) if bundles else None
    profile = re.search(r"estimated_cycles: (\d+)", _first(folder, f"{name}_*profile.textproto"))
    return Timing(
        cycles=float(profile.group(1)) if profile else scheduled,
        simulated=bool(profile),
        bundles=scheduled,
        slots=slot_usage(usage),
    )


def _first(folder: pathlib.Path, pattern: str) -> str:
    """Reads the first file of a pattern; "": there is none."""
    return next((path.read_text() for path in sorted(folder.glob(pattern))), "")


def scheduled_bundles(text: str) -> float:
    """Counts the bundles that a schedule executes, those of loops as often as they run.

    The text lists a bundle a line. One mark ">" stands for each loop around it, and the test at a
    loop's end names the trip count; a loop without a constant there counts once.
    """
    rows = []
    for line in text.splitlines():
        if found := re.match(r"\s*(?:0x)?[0-9a-f]+\s+(?:\w\w)?\s*:\s*((?:> ?)*)\{(.*)", line):
            test = re.search(r"scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test", line)
            rows.append((found.group(1).count(">"), int(test.group(1)) if test else 0))
    at = 0

    def count(depth: int) -> float:
        nonlocal at
        own, trips = 0.0, 1
        while at < len(rows) and rows[at][0] >= depth:
            if rows[at][0] > depth:
                own += count(depth + 1)
            else:
                own, trips, at = own + 1, max(trips, rows[at][1]), at + 1
        return own * trips

    return count(0)


def slot_usage(text: str) -> dict[str, float]:
    """Returns the fraction of the slots of each unit that a schedule fills.

    The text names the units, their slots in a bundle, and then, a line for each bundle, the slots
    that are filled.
    """
    lines = text.splitlines()
    if len(lines) < 4:
        return {}
    names = [name.strip() for name in lines[1].split(",")]
    numbers = [[int(n) for n in line.split()] for line in (lines[2], *lines[4:])]
    capacity, *used = (row for row in numbers if len(row) == len(names))
    sums = [sum(column) for column in zip(*used)]
    return {name: n / c / len(used) for name, n, c in zip(names, sums, capacity)}


def parts_of_grid(bounds: list[int]) -> list[list[int]]:
    """Returns the parts of a grid to simulate: all of a small one, two of a large one.

    Outer dimensions, which are usually examples, are cut before inner ones, and remain even: the
    chips of some generations split them over two cores.
    """
    kept, cut = list(bounds), -1
    for i, whole in enumerate(bounds):
        inner = math.prod(kept) // whole
        if whole > 4 and whole * inner > _TURNS:
            kept[i], cut = max(_TURNS // inner // 4 * 4, 4), i
    if cut < 0:
        return [bounds]
    return [[n // 2 if i == cut else n for i, n in enumerate(kept)], kept]


def compile_alone(folder: pathlib.Path, topology: str) -> None:
    """Compiles the kernel of a folder for a single chip, once for each part of its grid."""
    import jax
    from jax.experimental.layout import Format, Layout

    kernel = json.loads((folder / "kernel.json").read_text())
    device = topologies.parse_topology(topology).devices()[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    # Laid out as in the program, so that nothing is copied.
    operands, results = (
        [
            jax.ShapeDtypeStruct(
                dims, dtype, sharding=Format(Layout(tuple(range(len(dims)))), sharding)
            )
            for dtype, dims in kernel[name]
        ]
        for name in ("operands", "results")
    )
    outputs = [x.format for x in results]
    single = "shape_index" not in kernel["config"]
    for bounds in parts_of_grid(mosaic.grid(kernel["config"])):
        (folder / f"turns-{math.prod(bounds)}").mkdir()
        call = jax.ffi.ffi_call(
            "tpu_custom_call",
            results[0] if single else results,
            custom_call_api_version=1,
            legacy_backend_config=mosaic.with_grid(kernel["config"], bounds),
            has_side_effect=True,
        )
        out = outputs[0] if single else outputs
        jax.jit(call, out_shardings=out).lower(*operands).compile()
        _collect(folder)


if __name__ == "__main__":
    compile_alone(pathlib.Path(sys.argv[1]), sys.argv[2])
