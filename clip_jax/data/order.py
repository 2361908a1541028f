"""The order of a run: shuffles that need no memory and can be entered anywhere."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from clip_jax.errors import UserError

# Streams of random numbers, folded from the one seed.
ORDER, CROP, REPLACEMENT = range(3)

_ROUNDS = 8
_MASK = 2**64 - 1


class Permutation:
    """A pseudo-random permutation of range(size), a pure function of (size, seed, epoch).

    `permutation[slot]` costs some 10 µs and no memory whatever the size: a Feistel network over
    a grid of just enough rows and columns. The few cells beyond `size` are skipped by following
    the network on until it comes back inside, which keeps it a permutation.

    (tf.random.experimental.index_shuffle would do the same, but uses so few bits of its seed
    that sets of under 65,536 examples see their order again every 256 epochs.)

    Args:
      size: number of examples, at least 1.
      seed: non-negative.
      epoch: non-negative; each has its own order.
      stream: further numbers, for orders that must not resemble each other.
    """

    def __init__(self, size: int, seed: int, epoch: int, *stream: int):
        self.size = size
        self._rows = math.isqrt(size - 1) + 1
        self._columns = -(-size // self._rows)
        keys = np.random.SeedSequence([seed, ORDER, epoch, *stream]).generate_state(
            _ROUNDS, np.uint64
        )
        self._keys = [int(key) for key in keys]

    def __getitem__(self, slot: int) -> int:
        """The example at place `slot` of the epoch, both in [0, size)."""
        value = self._scramble(slot)
        while value >= self.size:
            value = self._scramble(value)
        return value

    def _scramble(self, value: int) -> int:
        """One pass of the network over the grid; each half-round can be undone, hence the pass."""
        row, column = divmod(value, self._columns)
        for round_, key in enumerate(self._keys):
            if round_ % 2:
                column = (column + _mix(row ^ key)) % self._columns
            else:
                row = (row + _mix(column ^ key)) % self._rows
        return row * self._columns + column


@functools.lru_cache(maxsize=4096)
def permutation(size: int, seed: int, epoch: int, *stream: int) -> Permutation:
    """`Permutation`, kept while it is in use."""
    return Permutation(size, seed, epoch, *stream)


def _mix(value: int) -> int:
    """Hashes 64 bits to 32 (multiply and fold, twice)."""
    value = (value * 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 32)) * 0xD6E8FEB86659FD93) & _MASK
    return value >> 32


class Order(Protocol):
    """Which example stands at each position of a run; a pure function, with no state.

    Attributes:
      size: number of examples of an epoch.
      lanes: positions p with equal p % lanes read neighbours together, so that one host should
        have them; 1: it does not matter.
    """

    @property
    def size(self) -> int: ...

    @property
    def lanes(self) -> int: ...

    def __getitem__(self, position: int) -> int:
        """The example at `position`, counted from 0 over the whole run."""
        ...


@dataclasses.dataclass(frozen=True)
class Stored:
    """Every epoch as stored."""

    size: int
    lanes: int = 1

    def __getitem__(self, position: int) -> int:
        return position % self.size


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """Every example once per epoch; each epoch in an order of its own, drawn from all orders.

    Attributes:
      seed: non-negative.
      part: of a mixture, so that parts of one size differ.
    """

    size: int
    seed: int
    part: int = 0
    lanes: int = 1

    def __getitem__(self, position: int) -> int:
        epoch, slot = divmod(position, self.size)
        return permutation(self.size, self.seed, epoch, self.part)[slot]


@dataclasses.dataclass(frozen=True)
class Windowed:
    """Every example once per epoch, in an order that reads neighbours together.

    An epoch is cut into runs of neighbours, which are shuffled over the whole set, laid end to
    end and dealt in equal stretches to `lanes` readers that take turns: position p is the next
    of lane p % lanes. Within a lane, windows of `window` examples are shuffled. So a lane needs
    the runs of one window in memory, and reads nearly every run once.

    Attributes:
      seed: non-negative.
      run: neighbours in a run.
      window: examples of a lane that are shuffled together.
      lanes: that take turns.
      part: of a mixture, so that parts of one size differ.
    """

    size: int
    seed: int
    run: int
    window: int
    lanes: int
    part: int = 0

    def __getitem__(self, position: int) -> int:
        epoch, slot = divmod(position, self.size)
        turn, lane = divmod(slot, self.lanes)
        each, more = divmod(self.size, self.lanes)
        first, length = lane * each + min(lane, more), each + (lane < more)
        # Lanes change windows at different times, so that reading is spread evenly.
        phase = lane * self.window // self.lanes
        window = (turn + phase) // self.window
        start = max(window * self.window - phase, 0)
        end = min((window + 1) * self.window - phase, length)
        shuffle = permutation(end - start, self.seed, epoch, self.part, lane + 1, window)
        return self._neighbour(epoch, first + start + shuffle[turn - start])

    def _neighbour(self, epoch: int, place: int) -> int:
        """The example at a place of the shuffled runs; what fills no run stays at the end."""
        number, offset = divmod(place, self.run)
        runs = self.size // self.run
        if number >= runs:
            return place
        return permutation(runs, self.seed, epoch, self.part)[number] * self.run + offset


class Weighted:
    """A mixture: parts take turns in proportion to their weights, each in its own order.

    Of every `ROUND` turns each part has its share exactly, spread at random; a part that is
    through begins its next epoch, whatever the others do. A turn is one position, or one of each
    lane where the parts have lanes.

    Attributes:
      size: of all parts together.
      shares: turns of each part in a round.
      lanes: of the parts.
    """

    ROUND = 10_000

    def __init__(self, parts: Sequence[Order], weights: Sequence[float], seed: int):
        """Makes a mixture.

        Args:
          parts: their orders, with equal lanes.
          weights: of each part, positive.
          seed: non-negative.

        Raises:
          UserError: a weight is not positive, or too small to be met in a round.
        """
        self.size = sum(part.size for part in parts)
        self.shares = _shares(weights, self.ROUND)
        (self.lanes,) = {part.lanes for part in parts}
        self._parts = parts
        self._first = list(itertools.accumulate((part.size for part in parts), initial=0))
        # By turn of a round: whose it is, and how many of the round its part had before.
        shuffle = Permutation(self.ROUND, seed, 0, len(parts))
        in_order = np.repeat(np.arange(len(parts)), self.shares)
        self._whose = in_order[[shuffle[turn] for turn in range(self.ROUND)]]
        self._before = np.zeros(self.ROUND, int)
        for part, share in enumerate(self.shares):
            self._before[self._whose == part] = np.arange(share)

    def __getitem__(self, position: int) -> int:
        turn, lane = divmod(position, self.lanes)
        round_, slot = divmod(turn, self.ROUND)
        part = int(self._whose[slot])
        own_turn = round_ * self.shares[part] + int(self._before[slot])
        return self._first[part] + self._parts[part][own_turn * self.lanes + lane]


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to the weights that add up to `total` (largest remainders)."""
    if not all(0 < weight < math.inf for weight in weights):
        raise UserError(f"The weights of a mixture must be positive numbers, not {list(weights)}.")
    exact = [weight / sum(weights) * total for weight in weights]
    shares = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    if not all(shares):
        raise UserError(
            f"A part of the mixture has less than one {total:,}th of the weight: {list(weights)}. "
            "Leave it out, or give it more."
        )
    return shares
