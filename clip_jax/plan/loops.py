"""Trip counts of while loops."""

import re

from clip_jax.plan.hlo import Computation, Instruction, Module

# Instructions that pass on their only operand.
_SAME = frozenset(("copy", "bitcast", "convert", "reshape", "copy-done", "opt-barrier"))


def trip_count(loop: Instruction, computation: Computation, module: Module) -> int | None:
    """Finds the trip count of a while loop; None where it is known at run time only.

    It is read from XLA's annotation, or from the loop itself: a counter that starts at a constant,
    grows by a constant and is compared with a constant.

    Args:
      loop: the while instruction.
      computation: computation of the instruction.
      module: program of both.
    """
    annotated = re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.attributes)
    if annotated:
        return int(annotated.group(1))
    test = _Scope(module.computations[loop.called("condition")[0]], module)
    body = _Scope(module.computations[loop.called("body")[0]], module)
    start = _Scope(computation, module)
    compared = test.comparison()
    if compared is None:
        return None
    left, right, direction = compared
    # The counter may stand on either side of the comparison.
    if body.grows(left) == 0:
        left, right = right, left
        direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
    step = body.grows(left)
    first, last = (start.first(side, loop.operands[0]) for side in (left, right))
    if not step or body.grows(right) != 0 or first is None or last is None:
        return None
    return _iterations(first, last, step, direction)


def _iterations(first: int, last: int, step: int, direction: str) -> int | None:
    """Counts the iterations of `for (i = first; i DIRECTION last; i += step)`."""
    if direction in ("GT", "GE"):
        first, last, step = -first, -last, -step
        direction = {"GT": "LT", "GE": "LE"}[direction]
    if direction == "LE":
        last += 1
    if direction not in ("LT", "LE", "NE") or step <= 0:
        return None
    return max(-(-(last - first) // step), 0)


class _Scope:
    """Constants and parameters of a computation, seen through copies and fusions."""

    def __init__(self, computation: Computation, module: Module, bound: tuple = ()):
        self.computation = computation
        self.module = module
        self.bound = bound  # values of the parameters, in a fusion

    def value(self, name: str) -> tuple[str, int] | None:
        """Returns ("constant", its value), ("state", position in the loop's tuple), or None."""
        x = self.computation.instructions[name]
        if x.opcode == "constant":
            return ("constant", int(x.literal)) if re.fullmatch(r"-?\d+", x.literal) else None
        if x.opcode in _SAME:
            return self.value(x.operands[0])
        if x.opcode == "parameter" and self.bound:
            return self.bound[int(x.literal)]
        if x.opcode == "get-tuple-element":
            source = self.computation.instructions[x.operands[0]]
            if source.opcode == "parameter" and not self.bound:
                return "state", int(x.attribute("index"))
        return None

    def inside(self, x: Instruction) -> "_Scope":
        """Returns the scope of a fusion or a call."""
        inner = self.module.computations[(x.called("calls") or x.called("to_apply"))[0]]
        return _Scope(inner, self.module, tuple(self.value(name) for name in x.operands))

    def comparison(self) -> tuple[tuple[str, int], tuple[str, int], str] | None:
        """Returns the two sides and the direction of the comparison at the root."""
        x = self.computation.root
        while x.opcode in _SAME:
            x = self.computation.instructions[x.operands[0]]
        if x.opcode in ("fusion", "call"):
            return self.inside(x).comparison()
        if x.opcode != "compare":
            return None
        left, right = (self.value(name) for name in x.operands)
        if left is None or right is None:
            return None
        return left, right, x.attribute("direction")

    def grows(self, side: tuple[str, int]) -> int | None:
        """Returns the change of a side in one iteration; None: it is not a constant."""
        kind, index = side
        if kind == "constant":
            return 0
        root = self.computation.root
        return self._sum(root.operands[index], index) if root.opcode == "tuple" else None

    def _sum(self, name: str, index: int) -> int | None:
        x = self.computation.instructions[name]
        if x.opcode in _SAME:
            return self._sum(x.operands[0], index)
        if x.opcode in ("fusion", "call"):
            inner = self.inside(x)
            return inner._sum(inner.computation.root.name, index)
        if x.opcode in ("add", "subtract"):
            left, right = (self.value(operand) for operand in x.operands)
            sign = -1 if x.opcode == "subtract" else 1
            if left == ("state", index) and right and right[0] == "constant":
                return sign * right[1]
            if right == ("state", index) and left and left[0] == "constant" and sign > 0:
                return left[1]
            return None
        return 0 if self.value(name) == ("state", index) else None

    def first(self, side: tuple[str, int], state: str) -> int | None:
        """Returns the value of a side before the first iteration, if it is a constant.

        Args:
          side: a side of the comparison.
          state: name of the loop's initial tuple.
        """
        kind, number = side
        if kind == "constant":
            return number
        x = self.computation.instructions[state]
        if x.opcode in _SAME:
            return self.first(side, x.operands[0])
        found = self.value(x.operands[number]) if x.opcode == "tuple" else None
        return found[1] if found and found[0] == "constant" else None
