"""Compiles the training step of a config for a topology, and gathers its figures."""

import dataclasses
import math
import pathlib
import re
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from clip_jax import models
from clip_jax.configs import default
from clip_jax.errors import UserError
from clip_jax.plan.chips import GIB, IMAGES_PER_CORE
from clip_jax.plan.progress import Report, stage
from clip_jax.plan.step_cost import Step, step_cost
from clip_jax.plan.topology import Topology
from clip_jax.training import program


@dataclasses.dataclass
class Memory:
    """Bytes of one chip's HBM.

    Attributes:
      parameters, optimizer, other: the training state; other are BatchNorm statistics and the
        step.
      batch: a chip's part of a batch.
      padding: overhead of the layout of all these.
      temporaries: arrays that live only inside the step; None: the compiler gave up.
      results: outputs that do not take the place of an input.
      code: the program.
      available: memory that a program can use.
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
        """The bytes that stay between steps, and a batch."""
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
class Host:
    """The input that a host has to load for its chips.

    Attributes:
      images: images per second that its chips take.
      images_per_core: images per second that one core loads.
      cores: cores that it has.
    """

    images: float
    images_per_core: float
    cores: int

    @classmethod
    def of(cls, topology: Topology, examples_per_second: float, images_per_core: float) -> "Host":
        """Computes the input of one host of a topology."""
        hosts = max(topology.size / topology.chip.devices / math.prod(topology.chip.host), 1.0)
        return cls(examples_per_second / hosts, images_per_core, topology.chip.host_cores)

    @property
    def needed_cores(self) -> float:
        return self.images / self.images_per_core

    @property
    def starves(self) -> bool:
        """Tells whether the chips would wait for their input."""
        return bool(self.needed_cores > self.cores)


@dataclasses.dataclass
class Plan:
    """The plan of a run.

    Attributes:
      model, batch_size, accum_steps, remat, loss: settings of the config.
      topology: name of the topology.
      slices: number of slices, joined by the data-centre network.
      chips: number of chips.
      devices: number of JAX devices; memory and step are those of one.
      mesh: size of each axis.
      memory: memory of one chip.
      step: cost of a step; None: the program does not fit.
      missing: bytes by which it does not fit.
      report: the compiler's own message then.
      total_steps: steps of the schedule.
      examples: examples of an epoch.
      duration: length of the schedule in the config's words.
      compile_seconds: time of compilation.
      host: input that a host has to load.
    """

    model: str
    batch_size: int
    accum_steps: int
    remat: str
    loss: str
    topology: str
    slices: int
    chips: int
    devices: int
    mesh: dict[str, int]
    memory: Memory
    step: Step | None
    missing: float
    report: str
    total_steps: int
    examples: float
    duration: str
    compile_seconds: float
    host: Host

    @property
    def fits(self) -> bool:
        return self.step is not None and self.memory.fits

    @property
    def examples_per_second(self) -> float | None:
        return self.batch_size / self.step.seconds if self.step else None

    @property
    def run_seconds(self) -> float | None:
        """The time of all steps of the schedule, without evaluation and checkpoints."""
        return self.total_steps * self.step.seconds if self.step else None

    def to_json(self) -> dict[str, Any]:
        """Returns all figures as JSON fields."""
        fields = dataclasses.asdict(self)
        fields["fits"] = self.fits
        fields["examples_per_second"] = self.examples_per_second
        fields["days"] = self.run_seconds / 86_400 if self.run_seconds else None
        fields["host"] |= {"needed_cores": self.host.needed_cores, "starves": self.host.starves}
        fields["memory"] |= {"peak": self.memory.peak, "resident": self.memory.resident}
        if self.step:
            fields["step"]["top"] = [
                dict(zip(("name", "origin", "times", "seconds", "flops", "bytes"), row))
                for row in self.step.top
            ]
        return fields


def make_plan(
    config: ConfigDict,
    topology: Topology,
    *,
    examples: float = 400e6,
    top: int = 10,
    images_per_core: float = IMAGES_PER_CORE,
    report: Report | None = None,
    hlo_file: str | None = None,
) -> Plan:
    """Compiles the training step; takes from seconds to minutes.

    Args:
      config: config with the fields of configs/default.py; the data are not looked at.
      topology: topology to compile for.
      examples: examples of an epoch.
      top: number of single instructions to list.
      images_per_core: images that a core of a host loads per second.
      report: called with lines of progress.
      hlo_file: file for the text of the compiled program; None: none.

    Raises:
      UserError: config, mesh and topology do not go together, or libtpu is missing.
    """
    began = time.monotonic()
    built = build(config, topology, examples)
    memory = _resident(built, topology)
    step, missing, failure = None, 0.0, ""
    try:
        with stage("Tracing the step", report):
            lowered = built.lower([100.0] * len(built.teacher_widths))  # whatever they learned
        with stage(f"Compiling for {topology}, which takes some minutes", report):
            compiled = lowered.compile()
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
        step = step_cost(text, built, topology, top, report)
        if built.teacher_widths:
            step.notes.append(
                f"The {len(built.teacher_widths)} teacher(s) of loss.teachers are left out: their "
                "parameters, and embedding each batch by them, come on top."
            )
        missing = max((memory.peak or 0.0) - memory.available, 0.0)
    return Plan(
        model=str(built.net.size),
        batch_size=config.batch_size,
        accum_steps=config.accum_steps,
        remat=config.model.remat,
        loss=_loss(config),
        topology=topology.name,
        slices=topology.slices,
        chips=topology.size // topology.chip.devices,
        devices=topology.size,
        mesh=dict(built.mesh.shape),
        memory=memory,
        step=step,
        missing=missing,
        report=failure,
        total_steps=built.total_steps,
        examples=examples,
        duration=config.duration,
        compile_seconds=time.monotonic() - began,
        host=Host.of(topology, config.batch_size / step.seconds if step else 0.0, images_per_core),
    )


def _loss(config: ConfigDict) -> str:
    """Describes the objective and its method."""
    if config.objective == "contrastive":
        return f"{config.loss.name}, {config.loss.method}"
    pairs = f", {config.loss.method}" if config.objective == "near_duplicates" else ""
    return config.objective + pairs


def build(config: ConfigDict, topology: Topology, examples: float) -> program.Program:
    """Builds the program of a config for a topology."""
    if config.mesh.slices != topology.slices:
        raise UserError(
            f"The config's mesh has {config.mesh.slices} slice(s), the topology {topology.slices}: "
            f"give --slices={config.mesh.slices}, or --config.mesh.slices={topology.slices}."
        )
    # Teachers are not opened, and are taken to be as wide as the model.
    width = models.get_size(config.model.name, config.model.size.to_dict()).embed_dim
    widths = [width] * len(default.teacher_names(config))
    devices = topology.devices()
    return program.build(config, int(examples), teacher_widths=widths, devices=devices)


def _resident(built: program.Program, topology: Topology) -> Memory:
    """Computes the memory that is known before compiling."""
    state = built.state
    parameters, optimizer = shard_bytes(state.params), shard_bytes((state.opt_state, state.ema))
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
    """Sums the bytes of one device's part of a tree of shapes with shardings."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )


def _complete(memory: Memory, compiled: jax.stages.Compiled) -> None:
    """Fills in the memory that the compiler reports."""
    found = compiled.memory_analysis()
    assert found is not None
    memory.padding = max(found.argument_size_in_bytes - memory.resident, 0.0)
    memory.temporaries = float(found.temp_size_in_bytes)
    memory.results = float(found.output_size_in_bytes - found.alias_size_in_bytes)
    memory.code = float(found.generated_code_size_in_bytes)


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


def read_shortage(report: str, memory: Memory) -> float:
    """Reads the missing bytes from the compiler's report, and the temporaries into `memory`."""

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
