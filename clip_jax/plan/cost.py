"""Adds up the costs of one step of a compiled program, loops included.

Computation takes the compiler's own estimate of cycles, one instruction after the other. Pallas
kernels, for which there is none, take the time of `kernels`.
Collectives take the time of the interconnect model. An asynchronous one, which has separate start
and done instructions, runs beside the instructions scheduled between them; each network runs one
collective at a time, and the done instruction waits for the rest. A synchronous one delays the step
by all of its time.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np

from clip_jax.plan import chips, flops, groups, kernels, loops
from clip_jax.plan.hlo import Computation, Instruction, Module
from clip_jax.plan.kernels import Timing
from clip_jax.plan.network import Network
from clip_jax.training import step

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A kind of collective.

    Attributes:
      kind: "all-gather", ...
      axes: mesh axes that it crosses, joined by "+".
      network: "ici" within a slice, "dcn" between slices.
      overlapped: whether it is asynchronous: started and awaited apart.
    """

    kind: str
    axes: str
    network: str
    overlapped: bool


@dataclasses.dataclass
class Op:
    """An instruction with all its executions in a step.

    Attributes:
      instruction: instruction of the scheduled program.
      title: instruction inside it whose name describes it best.
      times: number of executions in a step.
      seconds: time of computation, or of the collective, over all executions.
      flops: operations of matrix products and convolutions, over all executions.
      bytes: traffic to HBM, over all executions.
      exchange: kind of the collective; None: computation.
      volume: bytes that a collective moves, over all executions.
      kernel: Pallas kernel that it is or holds; None: there is none.
    """

    instruction: Instruction
    title: Instruction
    times: float = 1.0
    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    exchange: Exchange | None = None
    volume: float = 0.0
    kernel: Instruction | None = None

    @property
    def channel(self) -> str:
        """The occupied resource: "" for the cores, "hbm" for a copy beside them, "ici" or "dcn"."""
        if self.exchange:
            return self.exchange.network
        return "hbm" if self.instruction.opcode.endswith("-start") else ""

    def scaled(self, by: float) -> "Op":
        """Multiplies all executions."""
        return dataclasses.replace(
            self,
            times=self.times * by,
            seconds=self.seconds * by,
            flops=self.flops * by,
            bytes=self.bytes * by,
            volume=self.volume * by,
        )


@dataclasses.dataclass
class Cost:
    """The cost of one run of a computation.

    Attributes:
      ops: executed instructions with a cost.
      elapsed: seconds from first to last, waiting included.
      open_loops: number of loops whose trip count depends on the data; they count as not run.
      branches: seconds of the cheapest and of the most expensive branch of each conditional; the
        cheapest is counted, except of the update that may be skipped, which counts in full.
    """

    ops: list[Op] = dataclasses.field(default_factory=list)
    elapsed: float = 0.0
    open_loops: int = 0
    branches: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    def include(self, other: "Cost", times: float = 1.0) -> None:
        """Adds the cost of another computation that runs `times` times."""
        self.ops += other.ops if times == 1 else [op.scaled(times) for op in other.ops]
        self.elapsed += other.elapsed * times
        self.open_loops += other.open_loops
        self.branches += other.branches

    @property
    def flops(self) -> float:
        return sum(op.flops for op in self.ops)

    @property
    def bytes(self) -> float:
        return sum(op.bytes for op in self.ops)

    @property
    def compute_seconds(self) -> float:
        return sum(op.seconds for op in self.ops if not op.channel)

    @property
    def network_seconds(self) -> float:
        return sum(op.seconds for op in self.ops if op.exchange)


def program_cost(
    module: Module, network: Network, timings: Mapping[str, Timing] | None = None
) -> Cost:
    """Computes the cost of one step of a program on the chips of a network.

    Args:
      module: compiled program.
      network: network of the chips.
      timings: timings of its Pallas kernels, by instruction; without one, a kernel counts as it
        declares.
    """
    return _Walk(module, network, timings or {}).run(module.entry)


class _Walk:
    """A walk over the computations of a program, each of which is costed once."""

    def __init__(self, module: Module, network: Network, timings: Mapping[str, Timing]):
        self.module = module
        self.network = network
        self.timings = timings
        self.done: dict[str, Cost] = {}
        self.inner: dict[str, list[tuple[Computation, Instruction]]] = {}

    def run(self, computation: Computation) -> Cost:
        if computation.name not in self.done:
            self.done[computation.name] = self._run(computation)
        return self.done[computation.name]

    def _run(self, computation: Computation) -> Cost:
        total, timeline = Cost(), _Timeline()
        for x in computation:
            if x.opcode in ("while", "conditional", "call"):
                part = self._control(x, computation)
                timeline.now += part.elapsed
                total.include(part)
            elif awaited := self._awaits(x, computation, timeline):
                timeline.wait(awaited)
            elif op := self._op(x, computation):
                total.ops.append(op)
                timeline.add(op)
        total.elapsed = timeline.finish()
        return total

    def _control(self, x: Instruction, computation: Computation) -> Cost:
        part = Cost()
        if x.opcode == "while":
            trips = loops.trip_count(x, computation, self.module)
            for name in (*x.called("body"), *x.called("condition")):
                part.include(self.run(self.module.computations[name]), trips or 0)
            part.open_loops += trips is None
        elif x.opcode == "call":
            part.include(self.run(self.module.computations[x.called("to_apply")[0]]))
        else:
            names = [
                *x.called("branch_computations"),
                *x.called("true_computation"),
                *x.called("false_computation"),
            ]
            choices = [self.run(self.module.computations[name]) for name in names]
            choices.sort(key=lambda choice: (choice.elapsed, choice.flops))
            if step.SKIPPABLE in x.op_name:  # it is skipped once in many thousand steps
                part.include(choices[-1])
                return part
            # The cheapest branch is the common case; a note of the plan prices the others.
            part.include(choices[0])
            part.branches.append((choices[0].elapsed, choices[-1].elapsed))
        return part

    def _op(self, x: Instruction, computation: Computation) -> Op | None:
        if found := self._collective(x, computation):
            return found
        if x.opcode in flops.FREE or x.opcode.endswith(("-done", "-update")):
            return None
        inside = self._inside(x)
        products = [(home, y) for home, y in inside if flops.matmul_flops(y, home)]
        work = sum(flops.matmul_flops(y, home) for home, y in products)
        work += flops.matmul_flops(x, computation)
        traffic = flops.memory_traffic(x, computation, self.module)
        chip = self.network.topology.chip
        bandwidth, cycles = chip.hbm_bandwidth * chips.HBM_EFFICIENCY, x.cycles
        # A kernel, alone or with slices of its operands and results in a fusion.
        kernel = next((y for y in (x, *(y for _, y in inside)) if kernels.is_kernel(y)), None)
        if kernel:
            declared, declared_bytes = kernels.declared_cost(kernel)  # XLA does not look inside
            timing = self.timings.get(kernel.name)
            if timing and timing.cycles is not None:
                traffic = timing.bytes or traffic
                cycles = max(timing.cycles, traffic / bandwidth * chip.clock)
                work += declared or timing.flops or 0.0
            else:
                work += declared
                traffic = max(traffic, declared_bytes)
        if cycles is not None:
            seconds = cycles / chip.clock
        else:
            seconds = max(traffic / bandwidth, work / (chip.flops * chips.KERNEL_EFFICIENCY))
        if not (seconds or work or traffic):
            return None
        title = _title(x, products, inside)
        return Op(x, title, seconds=seconds, flops=work, bytes=traffic, kernel=kernel)

    def _inside(self, x: Instruction) -> list[tuple[Computation, Instruction]]:
        """Lists the instructions of a fusion, those of nested fusions too."""
        found = []
        for name in x.called("calls") if x.opcode in ("fusion", "async-start") else ():
            if name not in self.inner:
                computation = self.module.computations[name]
                own = [(computation, y) for y in computation]
                self.inner[name] = own + [z for y in computation for z in self._inside(y)]
            found += self.inner[name]
        return found

    # ---- Collectives ---------------------------------------------------------------------------

    def _collective(self, x: Instruction, computation: Computation) -> Op | None:
        if x.opcode == "send" and "megascale" in x.attributes:
            return self._between_slices(x, computation)
        kind = x.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            return self._exchange(x, kind, x, computation, x.opcode != kind)
        for home, y in self._inside(x):
            kind = y.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            started = _feeds(y, home, "AsyncCollectiveStart")
            if not started and ("async_collective_fusion_config" in y.attributes):
                return None  # a later part of a collective that was counted where it started
            # A fusion that keeps a part of the sum on every device is a reduce-scatter.
            if kind == "all-reduce" and x.bytes < _payload(y, home):
                kind = "reduce-scatter"
            return self._exchange(x, kind, y, home, started or x.opcode == "async-start")
        return None

    def _exchange(
        self, x: Instruction, kind: str, y: Instruction, home: Computation, overlapped: bool
    ) -> Op:
        """Costs a collective y, which is x or inside x."""
        if kind == "collective-permute":
            members = groups.source_target_pairs(y)
            volume = float(home.instructions[y.operands[0]].bytes)
        else:
            members = groups.device_groups(y, self.module.partitions)
            volume = _payload(y, home) * (members.shape[1] if kind == "all-gather" else 1)
        exchange = Exchange(kind, self.network.axes(members), "ici", overlapped)
        seconds = self.network.seconds(kind, volume, members)
        return Op(x, y, seconds=seconds, exchange=exchange, volume=volume)

    def _between_slices(self, x: Instruction, computation: Computation) -> Op:
        transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', x.attributes)
        kind = transfer.group(1).lower().replace("_", "-") if transfer else "one-to-one"
        kind = kind if kind in COLLECTIVES else "collective-permute"
        volume = float(computation.instructions[x.operands[0]].bytes)
        exchange = Exchange(kind, "slice", "dcn", True)
        seconds = self.network.dcn_seconds(kind, volume)
        return Op(x, x, seconds=seconds, exchange=exchange, volume=volume)

    def _awaits(self, x: Instruction, computation: Computation, timeline: "_Timeline") -> str:
        """Returns the name of the start that an instruction awaits; "": it awaits nothing."""
        if x.opcode in ("send-done", "recv-done"):
            return _rendezvous(computation.instructions[x.operands[0]])
        done = x.opcode.endswith("-done") or any(
            "AsyncCollectiveDone" in y.attributes for _, y in self._inside(x)
        )
        while done and x.operands and x.name not in timeline.ends:
            x = _carried(x, computation)
        return x.name if done else ""


class _Timeline:
    """The order of events on a chip.

    Attributes:
      now: seconds since the start of the computation, on the cores.
      free: time at which each channel is free.
      ends: time at which the transfer of each start instruction ends.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.free: dict[str, float] = {}
        self.ends: dict[str, float] = {}

    def add(self, op: Op) -> None:
        if not op.channel:
            self.now += op.seconds
            return
        # A channel carries one transfer at a time.
        end = max(self.now, self.free.get(op.channel, 0.0)) + op.seconds
        self.free[op.channel] = end
        self.ends[op.instruction.name] = self.ends[_rendezvous(op.instruction)] = end
        if op.exchange and not op.exchange.overlapped:  # the cores wait for a synchronous one
            self.now = end

    def wait(self, name: str) -> None:
        self.now = max(self.now, self.ends.get(name, 0.0))

    def finish(self) -> float:
        return max(self.now, *self.free.values(), 0.0) if self.free else self.now


def _rendezvous(x: Instruction) -> str:
    """Returns the common name of a send and its receive."""
    return x.attribute("_xla_host_transfer_rendezvous") or f"{x.name} alone"


def _carried(x: Instruction, computation: Computation) -> Instruction:
    """Follows the state of a running transfer one instruction back."""
    source = computation.instructions[x.operands[0]]
    if x.opcode == "get-tuple-element" and source.opcode == "fusion":
        index = x.attribute("index")
        aliases = source.attribute("output_to_operand_aliasing")
        at = aliases.find("{" + index + "}: (")
        if at >= 0:
            operand = aliases[at:].split("(", 1)[1].split(",")[0]
            return computation.instructions[source.operands[int(operand)]]
    return source


def _payload(y: Instruction, home: Computation) -> float:
    """Returns the bytes that a device puts into a collective."""
    return float(sum(home.instructions[name].bytes for name in y.operands))


def _feeds(y: Instruction, home: Computation, target: str) -> bool:
    return any(target in user.attributes for user in home.users[y.name])


def _title(
    x: Instruction,
    products: Iterable[tuple[Computation, Instruction]],
    inside: Iterable[tuple[Computation, Instruction]],
) -> Instruction:
    """Picks the title of a fusion: its matrix product, else an instruction with an origin."""
    for candidates in (products, [(None, x)], reversed(list(inside))):
        for _, y in candidates:
            if y.op_name:
                return y
    return x


def by_exchange(total: Cost) -> list[tuple[Exchange, float, float, float]]:
    """Sums the collectives of a step by kind, the longest first.

    Returns:
      (kind, number, bytes, seconds) of each.
    """
    sums: dict[Exchange, np.ndarray] = {}
    for op in total.ops:
        if op.exchange:
            row = np.array([op.times, op.volume, op.seconds])
            sums[op.exchange] = sums.get(op.exchange, np.zeros(3)) + row
    rows = [(exchange, float(x[0]), float(x[1]), float(x[2])) for exchange, x in sums.items()]
    return sorted(rows, key=lambda row: row[3], reverse=True)
