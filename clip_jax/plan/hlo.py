"""Reads the text of a compiled program: computations, instructions, shapes.

This file reads the structure alone; `loops`, `groups`, `flops` and `cost` interpret it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

# Bytes of an element; sub-byte types count as a whole byte, tokens as nothing.
_ITEM_BYTES = {
    "pred": 1,
    "bf16": 2,
    "token": 0,
    "opaque": 0,
    "c64": 8,
    "c128": 16,
}


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape.

    Attributes:
      dtype: name in HLO ("bf16").
      dims: dimensions.
      space: memory space; 0 is HBM, 1 the vector memory of a TensorCore.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """The size in bytes."""
        return self.size * item_bytes(self.dtype)


@functools.cache
def item_bytes(dtype: str) -> int:
    """Returns the bytes of one element: "f32" -> 4, "f8e4m3fn" -> 1."""
    if dtype in _ITEM_BYTES:
        return _ITEM_BYTES[dtype]
    bits = re.match(r"[a-z]+(\d+)", dtype)
    return max(int(bits.group(1)) // 8, 1) if bits else 0


@dataclasses.dataclass(eq=False)
class Instruction:
    """One line of a computation.

    Attributes:
      name: name without the percent sign.
      opcode: "fusion", "all-gather-start", ...
      type_text: text of the shape.
      operands: names of the operands, all in the same computation.
      literal: text between the parentheses, for constants and parameters.
      attributes: rest of the line.
      root: whether the computation returns it.
    """

    name: str
    opcode: str
    type_text: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of its shape, those of a tuple in order."""
        return parse_shape(self.type_text)

    @property
    def bytes(self) -> int:
        """The bytes of all arrays that it returns."""
        return sum(array.bytes for array in self.arrays)

    def attribute(self, name: str) -> str:
        """Returns the value of NAME=VALUE, up to the comma or balanced brackets; "": absent."""
        found = re.search(rf"(?:^|[\s,{{]){re.escape(name)}=", self.attributes)
        return _balanced(self.attributes, found.end()) if found else ""

    def called(self, name: str) -> tuple[str, ...]:
        """Returns the computations of an attribute: calls, body, branch_computations, ..."""
        return tuple(re.findall(r"%([\w.\-]+)", self.attribute(name)))

    @functools.cached_property
    def op_name(self) -> str:
        """The path in the traced function; "": the compiler created the instruction."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    @functools.cached_property
    def cycles(self) -> float | None:
        """The compiler's estimate for a TPU core; None where it gives none."""
        found = re.search(r'"estimated_cycles":"?(\d+)', self.attributes)
        return float(found.group(1)) if found else None


@dataclasses.dataclass(eq=False)
class Computation:
    """A list of instructions, in order of execution where the module is scheduled."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction that the computation returns."""
        return next(x for x in reversed(self.instructions.values()) if x.root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """The parameters by number."""
        found = (x for x in self if x.opcode == "parameter")
        return {int(x.literal): x for x in found}

    @functools.cached_property
    def users(self) -> Mapping[str, list[Instruction]]:
        """The users of each instruction, by its name."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self:
            for operand in dict.fromkeys(instruction.operands):
                found[operand].append(instruction)
        return found

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())


@dataclasses.dataclass(eq=False)
class Module:
    """A compiled program for one device, or for all devices of one slice.

    Attributes:
      entry: computation that runs.
      computations: all computations by name.
      partitions: number of devices that run it together.
      frames: calls of the source, see `Frames.stack`.
    """

    entry: Computation
    computations: dict[str, Computation]
    partitions: int
    frames: "Frames"


@dataclasses.dataclass(frozen=True)
class Frames:
    """The tables behind stack_frame_id, which lead from an instruction to calls of the source.

    Attributes:
      files, functions: names by number.
      locations: (file, function) by location number.
      parents: (location, parent frame) by frame number.
    """

    files: Mapping[int, str]
    functions: Mapping[int, str]
    locations: Mapping[int, tuple[int, int]]
    parents: Mapping[int, tuple[int, int]]

    def stack(self, instruction: Instruction) -> list[tuple[str, str]]:
        """Returns (file, function) of the calls behind an instruction, innermost first."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        frame, calls = int(found.group(1)) if found else 0, []
        while frame in self.parents:
            location, parent = self.parents[frame]
            file, function = self.locations.get(location, (0, 0))
            calls.append((self.files.get(file, ""), self.functions.get(function, "")))
            frame = parent
        return calls


def parse_module(text: str) -> Module:
    """Parses the text of a compiled program, as `compiled.as_text()` returns it."""
    computations: dict[str, Computation] = {}
    entry = None
    lines = iter(text.splitlines())
    header: list[str] = []
    for line in lines:
        if _is_heading(line):
            computation = _parse_computation(line, lines)
            computations[computation.name] = computation
            if line.startswith("ENTRY"):
                entry = computation
        elif not computations:
            header.append(line)
    if entry is None:
        raise ValueError("This is not the text of a compiled program: it has no ENTRY.")
    partitions = re.search(r"num_partitions=(\d+)", header[0] if header else "")
    return Module(
        entry, computations, int(partitions.group(1)) if partitions else 1, _parse_frames(header)
    )


def parse_shape(text: str) -> tuple[Array, ...]:
    """Parses the arrays of a shape such as "(f32[2,3]{1,0:T(8,128)S(1)}, s32[])"."""
    found = re.findall(r"([a-z][a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?", text)
    arrays = []
    for dtype, dims, layout in found:
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        arrays.append(Array(dtype, sizes, int(space.group(1)) if space else 0))
    return tuple(arrays)


def _is_heading(line: str) -> bool:
    return line.endswith("{") and (line.startswith(("%", "ENTRY ")) or " -> " in line)


def _parse_computation(heading: str, lines: Iterator[str]) -> Computation:
    name = heading.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
    instructions = {}
    for line in lines:
        if line.startswith("}"):
            break
        if instruction := _parse_instruction(line):
            instructions[instruction.name] = instruction
    return Computation(name, instructions)


def _parse_instruction(line: str) -> Instruction | None:
    head, equals, rest = line.strip().partition(" = ")
    if not equals:
        return None
    root, name = head.startswith("ROOT "), head.removeprefix("ROOT ").lstrip("%")
    rest = re.sub(r"/\*index=\d+\*/", "", rest) if "/*" in rest else rest
    type_text = _balanced(rest, 0) if rest.startswith("(") else rest.split(" ", 1)[0]
    rest = rest[len(type_text) :].lstrip()
    opcode, _, _ = rest.partition("(")
    inside = _balanced(rest, len(opcode))
    return Instruction(
        name=name,
        opcode=opcode,
        type_text=type_text,
        operands=() if opcode == "constant" else tuple(re.findall(r"%([\w.\-]+)", inside)),
        literal=inside[1:-1] if opcode in ("constant", "parameter") else "",
        attributes=rest[len(opcode) + len(inside) :].lstrip(", "),
        root=root,
    )


_CLOSING = {"(": ")", "{": "}", "[": "]"}


def _balanced(text: str, start: int) -> str:
    """Returns the text from `start` to the end of its bracketed group, or to a comma or space."""
    depth, quoted, at = 0, False, start
    while at < len(text):
        char = text[at]
        if quoted:
            if char == "\\":
                at += 1
            quoted = char != '"'
        elif char == '"':
            quoted = True
        elif char in _CLOSING:
            depth += 1
        elif char in ")}]":
            depth -= 1
            if depth == 0 and text[start] in _CLOSING:
                return text[start : at + 1]
        elif depth == 0 and char in ", ":
            return text[start:at]
        at += 1
    return text[start:]


def _parse_frames(header: list[str]) -> Frames:
    """Parses FileNames, FunctionNames, FileLocations and StackFrames in front of a module."""
    tables: dict[str, dict[int, str]] = {}
    current: dict[int, str] = {}
    for line in header:
        number, _, rest = line.partition(" ")
        if re.fullmatch(r"[A-Z]\w+", line):
            current = tables.setdefault(line, {})
        elif number.isdigit():
            current[int(number)] = rest.strip('"')

    def pairs(table: str, first: str, second: str) -> dict[int, tuple[int, int]]:
        found = {}
        for number, text in tables.get(table, {}).items():
            fields = dict(re.findall(r"(\w+)=(\d+)", text))
            found[number] = (int(fields.get(first, 0)), int(fields.get(second, 0)))
        return found

    frames = pairs("StackFrames", "file_location_id", "parent_frame_id")
    return Frames(
        tables.get("FileNames", {}),
        tables.get("FunctionNames", {}),
        pairs("FileLocations", "file_name_id", "function_name_id"),
        # Parents are written one too high, so that 1 is none.
        {frame: (location, parent - 1) for frame, (location, parent) in frames.items()},
    )
