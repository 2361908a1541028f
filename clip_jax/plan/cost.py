"""Adds up what one step of a compiled program does, loops included.

Computation goes instruction by instruction at the compiler's own estimate of cycles. Collectives
take the time of the interconnect model: one that is started and awaited apart runs beside the
instructions scheduled between, one at a time on each network, and only what is left when its result
is awaited delays the step; any other delays the step by all of its time.
"""

import dataclasses
import re
from collections.abc import Iterable

import numpy as np

from clip_jax.plan import chips, flops, groups, loops
from clip_jax.plan.hlo import Computation, Instruction, Module
from clip_jax.plan.network import Network

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
    """What a collective is, apart from where it stands.

    Attributes:
      kind: "all-gather", ...
      axes: of the mesh that it crosses, joined by "+".
      network: "ici" within a slice, "dcn" between slices.
      overlapped: whether it is started and awaited apart.
    """

    kind: str
    axes: str
    network: str
    overlapped: bool


@dataclasses.dataclass
class Op:
    """An instruction with all its turns.

    Attributes:
      instruction: of the scheduled program.
      title: the instruction inside it that says best what it is.
      times: that it runs in a step.
      seconds: of computation, all turns together; of a collective its own time.
      flops, bytes: likewise; operations of matrix products and convolutions, traffic to HBM.
      exchange: of a collective.
      volume: bytes that it moves, all turns together.
      channel: what it occupies: "" for the cores, "hbm" for a copy beside them, "ici" or "dcn".
    """

    instruction: Instruction
    title: Instruction
    times: float = 1.0
    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    exchange: Exchange | None = None
    volume: float = 0.0

    @property
    def channel(self) -> str:
        if self.exchange:
            return self.exchange.network
        return "hbm" if self.instruction.opcode.endswith("-start") else ""

    def scaled(self, by: float) -> "Op":
        return dataclasses.replace(
            self,
            times=self.times * by,
            seconds=self.seconds * by,
            flops=self.flops * by,
            bytes=self.bytes * by,
            volume=self.volume * by,
        )


@dataclasses.dataclass
class Tally:
    """What a computation does when it runs once.

    Attributes:
      ops: executed instructions that cost something.
      elapsed: seconds from first to last, waiting included.
      open_loops: loops whose turns depend on the data; none is counted.
      branches: (seconds of the cheapest branch, of the dearest) of conditionals; the cheapest is
        counted.
    """

    ops: list[Op] = dataclasses.field(default_factory=list)
    elapsed: float = 0.0
    open_loops: int = 0
    branches: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    def include(self, other: "Tally", times: float = 1.0) -> None:
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


def tally(module: Module, network: Network) -> Tally:
    """One step of a program on the chips of a network."""
    return _Walk(module, network).run(module.entry)


def is_kernel(x: Instruction) -> bool:
    """Whether it is a Pallas kernel, whose inside XLA does not know."""
    return x.opcode == "custom-call" and '"tpu_custom_call"' in x.attributes


class _Walk:
    def __init__(self, module: Module, network: Network):
        self.module = module
        self.network = network
        self.done: dict[str, Tally] = {}
        self.inner: dict[str, list[tuple[Computation, Instruction]]] = {}

    def run(self, computation: Computation) -> Tally:
        if computation.name not in self.done:
            self.done[computation.name] = self._run(computation)
        return self.done[computation.name]

    def _run(self, computation: Computation) -> Tally:
        total, timeline = Tally(), _Timeline()
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

    def _control(self, x: Instruction, computation: Computation) -> Tally:
        part = Tally()
        if x.opcode == "while":
            turns = loops.trip_count(x, computation, self.module)
            for name in (*x.called("body"), *x.called("condition")):
                part.include(self.run(self.module.computations[name]), turns or 0)
            part.open_loops += turns is None
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
        if is_kernel(x):
            declared = flops.kernel_cost(x)
            work += declared[0]
            traffic = max(traffic, declared[1])
        if x.cycles is not None:
            seconds = x.cycles / chip.clock
        else:
            moving = traffic / (chip.hbm_bandwidth * chips.HBM_SHARE)
            seconds = max(moving, work / (chip.flops * chips.KERNEL_SHARE))
        if not (seconds or work or traffic):
            return None
        return Op(x, _title(x, products, inside), seconds=seconds, flops=work, bytes=traffic)

    def _inside(self, x: Instruction) -> list[tuple[Computation, Instruction]]:
        """Instructions of a fusion, those of fusions in it too."""
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
                return None  # a part of one that was counted where it started
            if kind == "all-reduce" and x.bytes < _payload(y, home):
                kind = "reduce-scatter"  # every device keeps its part of the sum
            return self._exchange(x, kind, y, home, started or x.opcode == "async-start")
        return None

    def _exchange(
        self, x: Instruction, kind: str, y: Instruction, home: Computation, overlapped: bool
    ) -> Op:
        """A collective y, which is x or stands inside x."""
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
        """The name of what was started and is awaited here; "" for other instructions."""
        if x.opcode in ("send-done", "recv-done"):
            return _rendezvous(computation.instructions[x.operands[0]])
        done = x.opcode.endswith("-done") or any(
            "AsyncCollectiveDone" in y.attributes for _, y in self._inside(x)
        )
        while done and x.operands and x.name not in timeline.ends:
            x = _carried(x, computation)
        return x.name if done else ""


class _Timeline:
    """The order of events on a chip."""

    def __init__(self) -> None:
        self.now = 0.0
        self.free: dict[str, float] = {}  # when a channel has done all it was given
        self.ends: dict[str, float] = {}  # when what was started is done

    def add(self, op: Op) -> None:
        if not op.channel:
            self.now += op.seconds
            return
        end = max(self.now, self.free.get(op.channel, 0.0)) + op.seconds
        self.free[op.channel] = end
        self.ends[op.instruction.name] = self.ends[_rendezvous(op.instruction)] = end
        if op.exchange and not op.exchange.overlapped:
            self.now = end

    def wait(self, name: str) -> None:
        self.now = max(self.now, self.ends.get(name, 0.0))

    def finish(self) -> float:
        return max(self.now, *self.free.values(), 0.0) if self.free else self.now


def _rendezvous(x: Instruction) -> str:
    """What a send and a receive that belong together share."""
    return x.attribute("_xla_host_transfer_rendezvous") or f"{x.name} alone"


def _carried(x: Instruction, computation: Computation) -> Instruction:
    """Where the state of a running transfer comes from, one instruction back."""
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
    """Bytes that a device puts into a collective."""
    return float(sum(home.instructions[name].bytes for name in y.operands))


def _feeds(y: Instruction, home: Computation, target: str) -> bool:
    return any(target in user.attributes for user in home.users[y.name])


def _title(
    x: Instruction,
    products: Iterable[tuple[Computation, Instruction]],
    inside: Iterable[tuple[Computation, Instruction]],
) -> Instruction:
    """Of a fusion: its matrix product, else whatever knows its origin."""
    for candidates in (products, [(None, x)], reversed(list(inside))):
        for _, y in candidates:
            if y.op_name:
                return y
    return x


def by_exchange(total: Tally) -> list[tuple[Exchange, float, float, float]]:
    """(what, number, bytes, seconds) of all collectives of a step, the longest first."""
    sums: dict[Exchange, np.ndarray] = {}
    for op in total.ops:
        if op.exchange:
            row = np.array([op.times, op.volume, op.seconds])
            sums[op.exchange] = sums.get(op.exchange, np.zeros(3)) + row
    rows = [(what, float(x[0]), float(x[1]), float(x[2])) for what, x in sums.items()]
    return sorted(rows, key=lambda row: row[3], reverse=True)
