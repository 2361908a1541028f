"""The order of the examples of a run: shuffles that need no memory and can be entered anywhere."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

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
      seed: PRNG seed, non-negative.
      epoch: number of the epoch, non-negative; each has its own order.
      path: further numbers, for orders that must be independent of each other.
    """

    def __init__(self, size: int, seed: int, epoch: int, *path: int):
        self.size = size
        self._rows = math.isqrt(size - 1) + 1
        self._columns = -(-size // self._rows)
        keys = np.random.SeedSequence([seed, ORDER, epoch, *path]).generate_state(
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
        """Applies the network once; its half-rounds are invertible, so it permutes the grid."""
        row, column = divmod(value, self._columns)
        for round_, key in enumerate(self._keys):
            if round_ % 2:
                column = (column + _mix(row ^ key)) % self._columns
            else:
                row = (row + _mix(column ^ key)) % self._rows
        return row * self._columns + column


@functools.lru_cache(maxsize=4096)
def permutation(size: int, seed: int, epoch: int, *path: int) -> Permutation:
    """Returns a `Permutation`, from a cache while it is in use."""
    return Permutation(size, seed, epoch, *path)


def _mix(value: int) -> int:
    """Hashes 64 bits to 32 (multiply and fold, twice)."""
    value = (value * 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 32)) * 0xD6E8FEB86659FD93) & _MASK
    return value >> 32


@runtime_checkable  # so that annotations can be checked under test
class Order(Protocol):
    """The example at each position of a run; a pure function, with no state.

    Attributes:
      size: number of examples of an epoch.
      streams: number of interleaved streams. Positions p with equal p % streams read neighbours
        together, so that one host should have them; 1: it does not matter.
    """

    @property
    def size(self) -> int: ...

    @property
    def streams(self) -> int: ...

    def __getitem__(self, position: int) -> int:
        """The example at `position`, counted from 0 over the whole run."""
        ...


@dataclasses.dataclass(frozen=True)
class Stored:
    """Every epoch in the order in which the examples are stored."""

    size: int
    streams: int = 1

    def __getitem__(self, position: int) -> int:
        return position % self.size


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """Every example once per epoch; each epoch in an order of its own, drawn from all orders.

    Attributes:
      size: number of examples.
      seed: PRNG seed, non-negative.
      part: number of the part of a mixture, so that parts of one size differ.
    """

    size: int
    seed: int
    part: int = 0
    streams: int = 1

    def __getitem__(self, position: int) -> int:
        epoch, slot = divmod(position, self.size)
        return permutation(self.size, self.seed, epoch, self.part)[slot]


@dataclasses.dataclass(frozen=True)
class Windowed:
    """Every example once per epoch, in an order that reads neighbours together.

    An epoch is cut into chunks of neighbours. The chunks are shuffled over the whole set, laid end
    to end and cut into equal stretches, one for each of the interleaved streams: position p is the
    next one of stream p % streams. Within a stream, examples are shuffled in windows. So a stream
    needs only the chunks of one window in memory, and reads nearly every chunk once.

    Attributes:
      size: number of examples.
      seed: PRNG seed, non-negative.
      chunk: number of neighbours in a chunk.
      shuffle_window: number of examples of a stream that are shuffled together.
      streams: number of interleaved streams.
      part: number of the part of a mixture, so that parts of one size differ.
    """

    size: int
    seed: int
    chunk: int
    shuffle_window: int
    streams: int
    part: int = 0

    def __getitem__(self, position: int) -> int:
        epoch, slot = divmod(position, self.size)
        place, stream = divmod(slot, self.streams)
        each, more = divmod(self.size, self.streams)
        first, length = stream * each + min(stream, more), each + (stream < more)
        # Streams change windows at different times, so that reading is spread evenly.
        phase = stream * self.shuffle_window // self.streams
        window = (place + phase) // self.shuffle_window
        start = max(window * self.shuffle_window - phase, 0)
        end = min((window + 1) * self.shuffle_window - phase, length)
        shuffle = permutation(end - start, self.seed, epoch, self.part, stream + 1, window)
        return self._neighbour(epoch, first + start + shuffle[place - start])

    def _neighbour(self, epoch: int, place: int) -> int:
        """The example at a place of the shuffled chunks; an incomplete chunk stays at the end."""
        number, offset = divmod(place, self.chunk)
        chunks = self.size // self.chunk
        if number >= chunks:
            return place
        return permutation(chunks, self.seed, epoch, self.part)[number] * self.chunk + offset


class Weighted:
    """A mixture: parts alternate in proportion to their weights, each in its own order.

    In every round of `ROUND` slots each part has exactly its number of slots, spread at random. A
    part that is through begins its next epoch, whatever the others do. A slot is one position, or
    one of each stream where the parts have interleaved streams.

    Attributes:
      size: number of examples of all parts together.
      sizes: number of examples of each part.
      slots: number of slots of each part in a round.
      streams: number of interleaved streams of each part.
    """

    ROUND = 10_000

    def __init__(self, parts: Sequence[Order], weights: Sequence[float], seed: int):
        """Makes a mixture.

        Args:
          parts: the orders of the parts, with equal numbers of streams.
          weights: weight of each part, positive.
          seed: PRNG seed, non-negative.

        Raises:
          UserError: a weight is not positive, or too small to be met in a round.
        """
        self.size = sum(part.size for part in parts)
        self.slots = _apportion(weights, self.ROUND)
        (self.streams,) = {part.streams for part in parts}
        self.sizes = [part.size for part in parts]
        self._parts = parts
        self._first = list(itertools.accumulate((part.size for part in parts), initial=0))
        # By slot of a round: its part, and how many slots of the round the part had before it.
        shuffle = Permutation(self.ROUND, seed, 0, len(parts))
        in_order = np.repeat(np.arange(len(parts)), self.slots)
        self._part = in_order[[shuffle[slot] for slot in range(self.ROUND)]]
        self._before = np.zeros(self.ROUND, int)
        for part, count in enumerate(self.slots):
            self._before[self._part == part] = np.arange(count)

    def epochs(self, position: int) -> list[float]:
        """Returns the epochs of each part in the positions before this one, up to a slot."""
        round_, slot = divmod(position // self.streams, self.ROUND)
        begun = np.bincount(self._part[:slot], minlength=len(self.slots))
        places = round_ * np.array(self.slots) + begun
        return [float(n) * self.streams / size for n, size in zip(places, self.sizes)]

    def __getitem__(self, position: int) -> int:
        place, stream = divmod(position, self.streams)
        round_, slot = divmod(place, self.ROUND)
        part = int(self._part[slot])
        own_place = round_ * self.slots[part] + int(self._before[slot])
        return self._first[part] + self._parts[part][own_place * self.streams + stream]


def _apportion(weights: Sequence[float], total: int) -> list[int]:
    """Returns integers in proportion to the weights that sum to `total` (largest remainders)."""
    if not all(0 < weight < math.inf for weight in weights):
        raise UserError(f"The weights of a mixture must be positive numbers, not {list(weights)}.")
    exact = [weight / sum(weights) * total for weight in weights]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    if not all(counts):
        raise UserError(
            f"A part of the mixture has less than one {total:,}th of the weight: {list(weights)}. "
            "Leave it out, or give it more."
        )
    return counts
