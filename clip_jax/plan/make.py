"""Compiles the training step of a config for a topology and gathers what there is to know."""

import dataclasses
import math
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from clip_jax.common import clock
from clip_jax.errors import UserError
from clip_jax.models import flops as model_flops
from clip_jax.plan import chips, cost, hlo, parts
from clip_jax.plan.chips import GIB
from clip_jax.plan.network import Network
from clip_jax.plan.topology import Topology
from clip_jax.training import program


@dataclasses.dataclass
class Memory:
    """Bytes of one chip's HBM.

    Attributes:
      parameters, optimizer, other: of the training state; other are BatchNorm statistics and the
        step.
      batch: a batch's share.
      padding: what the layout of all these adds.
      temporaries: everything alive only inside the step; None where the compiler gave up.
      results: outputs that do not take the place of an input.
      code: the program.
      available: to a program.
    """

    parameters: float
    optimizer: float
    other: float
    batch: float
    padding: float
    temporaries: float | None
    results: float
    code: float
    available: float

    @property
    def resident(self) -> float:
        """What lives in HBM between steps and a batch."""
        return self.parameters + self.optimizer + self.other + self.batch + self.padding

    @property
    def peak(self) -> float | None:
        if self.temporaries is None:
            return None
        return self.resident + self.temporaries + self.results + self.code

    @property
    def fits(self) -> bool:
        return self.peak is not None and self.peak <= self.available


@dataclasses.dataclass
class Collective:
    """A kind of exchange in one step, seen by one chip.

    Attributes:
      kind: "all-gather", ...
      axes: of the mesh that it crosses, joined by "+".
      network: "ici" within a slice, "dcn" between slices.
      overlapped: whether the compiler runs it beside computation.
      count: how often.
      bytes: of the whole gathered, reduced or scattered array, or of what a chip sends.
      seconds: by the interconnect model.
    """

    kind: str
    axes: str
    network: str
    overlapped: bool
    count: float
    bytes: float
    seconds: float


@dataclasses.dataclass
class Step:
    """What one step costs one chip.

    Attributes:
      seconds: predicted, from the first instruction to the last.
      compute_seconds: of all computation, by XLA's estimate of cycles.
      network_seconds: of all collectives, by the interconnect model.
      model_flops: operations that the model needs (see `model_flops`), a chip's share.
      hardware_flops: operations executed, recomputation included.
      bytes: read from and written to HBM.
      mfu, hfu: model and hardware operations as a share of the peak.
      collectives: by kind and axes, the longest first.
      parts: (name, seconds, operations) of computation, the longest first.
      top: (instruction, origin, turns, seconds, operations, bytes) of single ones.
      notes: what the figures assume.
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
    parts: list[tuple[str, float, float]]
    top: list[tuple[str, str, float, float, float, float]]
    notes: list[str]


@dataclasses.dataclass
class Plan:
    """All of it.

    Attributes:
      model, batch_size, accum_steps, remat, loss: of the config.
      topology: its name.
      slices: joined by the data-centre network.
      chips: devices in all.
      mesh: size of each axis.
      memory: of one chip.
      step: None where the program does not fit.
      missing: bytes by which it does not fit.
      report: the compiler's own words then.
      total_steps: of the schedule.
      examples: of an epoch.
      duration: of the schedule, as the config has it.
      compile_seconds: that it took to find out.
    """

    model: str
    batch_size: int
    accum_steps: int
    remat: str
    loss: str
    topology: str
    slices: int
    chips: int
    mesh: dict[str, int]
    memory: Memory
    step: Step | None
    missing: float
    report: str
    total_steps: int
    examples: float
    duration: str
    compile_seconds: float

    @property
    def fits(self) -> bool:
        return self.step is not None and self.memory.fits

    @property
    def examples_per_second(self) -> float | None:
        return self.batch_size / self.step.seconds if self.step else None

    @property
    def run_seconds(self) -> float | None:
        """Of all steps of the schedule; evaluation and checkpoints not included."""
        return self.total_steps * self.step.seconds if self.step else None

    def to_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        fields["fits"] = self.fits
        fields["examples_per_second"] = self.examples_per_second
        fields["days"] = self.run_seconds / 86_400 if self.run_seconds else None
        fields["memory"] |= {"peak": self.memory.peak, "resident": self.memory.resident}
        if self.step:
            fields["step"]["top"] = [
                dict(zip(("name", "origin", "times", "seconds", "flops", "bytes"), row))
                for row in self.step.top
            ]
            fields["step"]["parts"] = [
                dict(zip(("name", "seconds", "flops"), row)) for row in self.step.parts
            ]
        return fields


def make_plan(
    config: ConfigDict,
    topology: Topology,
    *,
    examples: float = 400e6,
    top: int = 10,
    report: Callable[[str], None] | None = None,
    hlo_file: str | None = None,
) -> Plan:
    """Compiles the training step; takes from seconds to minutes.

    Args:
      config: as in configs/default.py; the data are not looked at.
      topology: to compile for.
      examples: of an epoch.
      top: how many single instructions are listed.
      report: told what takes so long, once all that can be checked at once is.
      hlo_file: where the text of the compiled program is written; None: nowhere.

    Raises:
      UserError: config, mesh and topology do not go together, or libtpu is missing.
    """
    began = time.monotonic()
    built, total = build(config, topology, examples)
    memory = _resident(built, topology)
    if report:
        report(f"Compiling for {topology}; this takes some minutes.")
    step, missing, failure = None, 0.0, ""
    try:
        compiled = built.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise UserError(
                f"The TPU compiler refuses this program, for a reason that is not memory: "
                f"{str(error).strip().splitlines()[0][:300]}."
            ) from error
        failure = str(error)
        missing = read_shortage(failure, memory)
    else:
        text = compiled.as_text() or ""
        if hlo_file:
            pathlib.Path(hlo_file).write_text(text)
        _complete(memory, compiled)
        step = _step(text, built, topology, top)
        missing = max((memory.peak or 0.0) - memory.available, 0.0)
    return Plan(
        model=str(built.net.size),
        batch_size=config.batch_size,
        accum_steps=config.accum_steps,
        remat=config.model.remat,
        loss=_loss(config),
        topology=topology.name,
        slices=topology.slices,
        chips=topology.size,
        mesh=dict(built.mesh.shape),
        memory=memory,
        step=step,
        missing=missing,
        report=failure,
        total_steps=total,
        examples=examples,
        duration=config.duration,
        compile_seconds=time.monotonic() - began,
    )


def _loss(config: ConfigDict) -> str:
    """What the config minimises, and how."""
    if config.objective == "contrastive":
        return f"{config.loss.name}, {config.loss.method}"
    pairs = f", {config.loss.method}" if config.objective == "near_duplicates" else ""
    return config.objective + pairs


def build(config: ConfigDict, topology: Topology, examples: float) -> tuple[program.Program, int]:
    """The program of a config for a topology, and the steps of its schedule."""
    if config.mesh.slices != topology.slices:
        raise UserError(
            f"The config's mesh has {config.mesh.slices} slice(s), the topology {topology.slices}: "
            f"give --slices={config.mesh.slices}, or --config.mesh.slices={topology.slices}."
        )
    lengths = {"batch_size": config.batch_size, "examples_per_epoch": int(examples)}
    total = clock.to_steps(config.duration, **lengths)
    warmup = clock.to_steps(config.optim.warmup, total_steps=total, **lengths)
    devices = topology.devices()
    return program.build(config, warmup=warmup, total=total, devices=devices), total


def _resident(built: program.Program, topology: Topology) -> Memory:
    """What is known before compiling."""
    state = built.state
    parameters, optimizer = shard_bytes(state.params), shard_bytes(state.opt_state)
    return Memory(
        parameters=parameters,
        optimizer=optimizer,
        other=shard_bytes(state) - parameters - optimizer,
        batch=shard_bytes(built.batch),
        padding=0.0,
        temporaries=None,
        results=0.0,
        code=0.0,
        available=topology.chip.hbm,
    )


def shard_bytes(tree: Any) -> float:
    """Bytes of one device's part of a tree of shapes with shardings."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )


def _complete(memory: Memory, compiled: jax.stages.Compiled) -> None:
    found = compiled.memory_analysis()
    assert found is not None
    memory.padding = max(found.argument_size_in_bytes - memory.resident, 0.0)
    memory.temporaries = float(found.temp_size_in_bytes)
    memory.results = float(found.output_size_in_bytes - found.alias_size_in_bytes)
    memory.code = float(found.generated_code_size_in_bytes)


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


def read_shortage(report: str, memory: Memory) -> float:
    """Bytes that are missing, by the compiler's report; notes the temporaries where it has them."""

    def size(pattern: str) -> float | None:
        found = re.search(pattern.replace("SIZE", r"([\d.]+)([KMGT]?)i?B?"), report)
        return float(found.group(1)) * _UNITS[found.group(2)] if found else None

    needed = size(r"HLO temporaries \(SIZE\)") or size(r"program\s+SIZE")
    if needed:
        memory.temporaries = needed
    used = size(r"Used SIZE of")
    if used is None and needed:
        used = needed + memory.resident
    exceeded = size(r"[Ee]xceeded \w+ capacity by SIZE")
    return exceeded or max((used or 0.0) - memory.available, 0.0)


def _step(text: str, built: program.Program, topology: Topology, top: int) -> Step:
    module = hlo.parse_module(text)
    total = cost.tally(module, Network.of(built.mesh, topology, module.partitions))
    needed = model_flops.step_flops(built.net.size, built.config.batch_size) / topology.size
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
            Collective(what.kind, what.axes, what.network, what.overlapped, *amounts)
            for what, *amounts in cost.by_exchange(total)
        ],
        parts=parts.by_part(total, module.frames),
        top=_top(total, top),
        notes=_notes(total, topology),
    )


def _top(total: cost.Tally, count: int) -> list[tuple[str, str, float, float, float, float]]:
    ops = sorted(total.ops, key=lambda op: -op.seconds)
    ops = [op for op in ops if op.channel != "hbm"][:count]
    return [
        (op.instruction.name, op.title.op_name, op.times, op.seconds, op.flops, op.bytes)
        for op in ops
    ]


def _notes(total: cost.Tally, topology: Topology) -> list[str]:
    chip = topology.chip
    notes = [
        f"Computation: XLA's estimated cycles at {chip.clock / 1e9:.2f} GHz, loop turns counted; a "
        "model of the chip, good for comparing programs, not a promise.",
        f"Interconnect: {chip.ici_link / 1e9:.0f} GB/s per link and direction, every dimension of "
        "the chips' box in use at once, 1 us a hop. What is started and awaited apart runs beside "
        "the computation scheduled between, one at a time; all else is waited for.",
    ]
    if topology.slices > 1:
        notes.append(
            f"Between slices: {chip.dcn / 1e9:.2f} GB/s per chip, its share of the host's cards."
        )
    if total.branches:
        dearest = sum(b[1] - b[0] for b in total.branches)
        notes.append(
            f"{len(total.branches)} conditional(s) count as their cheapest branch, which is the "
            f"common case; one turn of all the dearest adds {dearest * 1e3:.2f} ms."
        )
    kernels = [op for op in total.ops if cost.is_kernel(op.instruction)]
    if kernels:
        silent = sum(not op.flops for op in kernels)
        notes.append(
            f"{len(kernels)} Pallas kernel(s) count at {chips.KERNEL_SHARE:.0%} of the peak, or at "
            f"the bandwidth of HBM where that is slower, by the cost they declare; {silent} of "
            "them declare no operations."
        )
    if total.open_loops:
        notes.append(
            f"{total.open_loops} loop(s) whose turns depend on the data count as none, which is "
            "what text packing's further turns are for most batches."
        )
    return notes
