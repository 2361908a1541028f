"""The order of an epoch: a shuffle that needs no memory and can be entered anywhere."""

import functools
import math

import numpy as np

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
    """

    def __init__(self, size: int, seed: int, epoch: int):
        self.size = size
        self._rows = math.isqrt(size - 1) + 1
        self._columns = -(-size // self._rows)
        keys = np.random.SeedSequence([seed, ORDER, epoch]).generate_state(_ROUNDS, np.uint64)
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


@functools.lru_cache(maxsize=16)
def permutation(size: int, seed: int, epoch: int) -> Permutation:
    """`Permutation`, kept for the epochs in use."""
    return Permutation(size, seed, epoch)


def _mix(value: int) -> int:
    """Hashes 64 bits to 32 (multiply and fold, twice)."""
    value = (value * 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 32)) * 0xD6E8FEB86659FD93) & _MASK
    return value >> 32
