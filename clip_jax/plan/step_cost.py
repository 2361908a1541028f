"""The cost of one step on one chip, from its compiled program."""

import dataclasses

from clip_jax.models import flops as model_flops
from clip_jax.plan import chips, cost, hlo, kernels, parts
from clip_jax.plan.network import Network
from clip_jax.plan.progress import Report
from clip_jax.plan.topology import Topology
from clip_jax.training import program


@dataclasses.dataclass
class Collective:
    """The collectives of one kind in a step, as one chip sees them.

    Attributes:
      kind: "all-gather", ...
      axes: mesh axes that it crosses, joined by "+".
      network: "ici" within a slice, "dcn" between slices.
      overlapped: whether the compiler runs it beside computation.
      count: number in a step.
      bytes: size of the whole gathered, reduced or scattered array, or of a chip's message.
      seconds: time by the interconnect model.
    """

    kind: str
    axes: str
    network: str
    overlapped: bool
    count: float
    bytes: float
    seconds: float


@dataclasses.dataclass
class Kernel:
    """A Pallas kernel in a step.

    Attributes:
      name: instruction, or the first of several.
      part: part of the model that it belongs to.
      times: number of calls in a step.
      seconds: time of all calls.
      flops: operations of a call, as it declares or as its matrix products have.
      bytes: arrays that a call takes from HBM and leaves there.
      timing: cycles of a call, and the schedule behind them; None: not known.
    """

    name: str
    part: str
    times: float
    seconds: float
    flops: float
    bytes: float
    timing: kernels.Timing | None


@dataclasses.dataclass
class Step:
    """The cost of one step on one chip.

    Attributes:
      seconds: predicted time from the first instruction to the last.
      compute_seconds: time of all computation, by XLA's estimate of cycles.
      network_seconds: time of all collectives, by the interconnect model.
      model_flops: a chip's part of the operations that the model needs (`models.flops`).
      hardware_flops: executed operations, recomputation included.
      bytes: traffic to HBM.
      mfu, hfu: model and hardware operations as a fraction of the peak.
      collectives: collectives, summed by kind and axes, the longest first.
      parts: parts of the computation, the longest first.
      top: (instruction, origin, executions, seconds, operations, bytes) of single instructions.
      kernels: Pallas kernels, the longest first.
      notes: assumptions behind the figures.
    """

    seconds: float
    compute_seconds: float
    network_seconds: float
    model_flops: float
    hardware_flops: float
    bytes: float
    mfu: float
    hfu: float
    collectives: list[Collective]
    parts: list[parts.Part]
    top: list[tuple[str, str, float, float, float, float]]
    kernels: list[Kernel]
    notes: list[str]


def step_cost(
    text: str,
    built: program.Program,
    topology: Topology,
    top: int,
    report: Report | None = None,
) -> Step:
    """Computes the cost of a step from the text of its compiled program.

    Args:
      text: text of the program.
      built: program that it was compiled from.
      topology: topology that it was compiled for.
      top: number of single instructions to list.
      report: called with lines of progress.
    """
    module = hlo.parse_module(text)
    timings = kernels.time_kernels(module, topology, report)
    network = Network.of(built.mesh, topology, module.partitions)
    total = cost.program_cost(module, network, timings)
    batch_size, captions = built.config.batch_size, built.config.data.captions
    needed = model_flops.step_flops(built.net.size, batch_size, captions) / topology.size
    peak = topology.chip.flops * total.elapsed
    return Step(
        seconds=total.elapsed,
        compute_seconds=total.compute_seconds,
        network_seconds=total.network_seconds,
        model_flops=needed,
        hardware_flops=total.flops,
        bytes=total.bytes,
        mfu=needed / peak,
        hfu=total.flops / peak,
        collectives=[
            Collective(kind.kind, kind.axes, kind.network, kind.overlapped, *amounts)
            for kind, *amounts in cost.by_exchange(total)
        ],
        parts=parts.by_part(total, module.frames, topology.chip),
        top=_top(total, top),
        kernels=_kernels(total, module.frames, timings),
        notes=_notes(total, topology, timings),
    )


def _top(total: cost.Cost, count: int) -> list[tuple[str, str, float, float, float, float]]:
    ops = sorted(total.ops, key=lambda op: -op.seconds)
    ops = [op for op in ops if op.channel != "hbm"][:count]
    return [
        (op.instruction.name, op.title.op_name, op.times, op.seconds, op.flops, op.bytes)
        for op in ops
    ]


def _kernels(
    total: cost.Cost, frames: hlo.Frames, timings: dict[str, kernels.Timing]
) -> list[Kernel]:
    """Lists the kernels; equal ones of a part, those of unrolled layers, count together."""
    found: dict[tuple, Kernel] = {}
    for op in total.ops:
        if op.kernel and op.times:
            part, timing = parts.label(op, frames), timings.get(op.kernel.name)
            flops, size = op.flops / op.times, op.bytes / op.times
            key = part, id(timing), flops, size
            row = found.setdefault(key, Kernel(op.kernel.name, part, 0, 0, flops, size, timing))
            row.times += op.times
            row.seconds += op.seconds
    return sorted(found.values(), key=lambda row: -row.seconds)


def _notes(total: cost.Cost, topology: Topology, timings: dict[str, kernels.Timing]) -> list[str]:
    chip = topology.chip
    notes = [
        f"Computation: XLA's estimated cycles at {chip.clock / 1e9:.2f} GHz, loop iterations "
        "counted; a model of the chip, good for comparing programs, not a promise.",
        f"Interconnect: {chip.ici_link / 1e9:.0f} GB/s per link and direction, every dimension of "
        "the chips' box in use at once, 1 us a hop. Asynchronous collectives run beside the "
        "computation scheduled between start and done, one at a time; all others are waited for.",
    ]
    if topology.slices > 1:
        notes.append(
            f"Between slices: {chip.dcn / 1e9:.2f} GB/s per chip, its part of the host's cards."
        )
    if total.branches:
        extra = sum(high - low for low, high in total.branches)
        notes.append(
            f"{len(total.branches)} conditional(s) count as their cheapest branch, which is the "
            f"common case; the most expensive branches would add {extra * 1e3:.2f} ms."
        )
    notes += _kernel_notes(total, timings)
    if total.open_loops:
        notes.append(
            f"{total.open_loops} loop(s) whose trip count depends on the data count as not run: "
            "text packing needs no further iterations for most batches."
        )
    return notes


def _kernel_notes(total: cost.Cost, timings: dict[str, kernels.Timing]) -> list[str]:
    names = {op.kernel.name: timings.get(op.kernel.name) for op in total.ops if op.kernel}
    simulated = sum(bool(t and t.simulated) for t in names.values())
    unknown = sum(t is None or t.cycles is None for t in names.values())
    reasons = "; ".join(dict.fromkeys(t.reason for t in names.values() if t and t.reason))
    notes = []
    if simulated:
        notes.append(
            f"{simulated} Pallas kernel(s): cycles by the compiler's simulation of all their "
            "instructions, each compiled alone; or the time of their arrays from and to HBM, where "
            "that is longer."
        )
    if scheduled := len(names) - simulated - unknown:
        notes.append(
            f"{scheduled} Pallas kernel(s) cannot be simulated and count a cycle for each "
            f"scheduled bundle of instructions (~ in the table), which is too few: {reasons}."
        )
    if unknown:
        notes.append(
            f"{unknown} Pallas kernel(s) do not compile alone and count at "
            f"{chips.KERNEL_EFFICIENCY:.0%} of the peak, or at the bandwidth of HBM where that is "
            f"slower, by the cost they declare: {reasons or 'not compiled'}."
        )
    return notes
