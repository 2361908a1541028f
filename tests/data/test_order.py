"""Orders of examples, against what their definitions say by hand."""

import collections
import math

import numpy as np
import pytest

from clip_jax.data import order
from clip_jax.errors import UserError


class TestPermutation:
    @pytest.mark.parametrize("size", [*range(1, 40), 255, 256, 257, 1000, 4099])
    def test_is_a_permutation(self, size):
        for seed, epoch in [(0, 0), (0, 1), (7, 3)]:
            shuffle = order.Permutation(size, seed, epoch)
            assert sorted(shuffle[slot] for slot in range(size)) == list(range(size))

    def test_is_uniform(self):
        """Slot and example, and the step from one slot to the next, are as independent as drawn."""
        size, epochs = 10, 4000
        orders = np.array(
            [[order.Permutation(size, 1, e)[slot] for slot in range(size)] for e in range(epochs)]
        )
        assert len(np.unique(orders, axis=0)) > 0.99 * epochs  # of 3.6 million
        places = np.array([np.bincount(column, minlength=size) for column in orders.T])
        chi_square = ((places - epochs / size) ** 2 / (epochs / size)).sum()
        assert chi_square < 130  # 81 degrees of freedom; 1 in 2,500
        steps = np.bincount((np.diff(orders) % size).ravel(), minlength=size)[1:]
        assert ((steps / steps.mean() - 1) ** 2).sum() * steps.mean() < 35  # 8 degrees of freedom
        repeats = (orders[1:] == orders[:-1]).mean()
        np.testing.assert_allclose(repeats, 1 / size, atol=0.01)

    def test_seeds_and_epochs_differ(self):
        size = 1000
        orders = {
            tuple(order.Permutation(size, seed, epoch)[slot] for slot in range(size))
            for seed in range(4)
            for epoch in range(4)
        }
        assert len(orders) == 16

    def test_billions(self):
        shuffle = order.Permutation(10**10, 0, 0)
        drawn = [shuffle[slot] for slot in range(9_999_990_000, 10**10)]
        assert len(set(drawn)) == 10_000
        np.testing.assert_allclose(np.mean(drawn), 5e9, rtol=0.03)
        assert 0 <= min(drawn) < 10**8
        assert 10**10 - 10**8 < max(drawn) < 10**10


SIZES = [1, 5, 63, 64, 65, 1000, 1023, 4099]


class TestWindowed:
    @pytest.mark.parametrize("size", SIZES)
    def test_every_example_once_per_epoch(self, size):
        for chunk, window, streams in [(1, 1, 1), (4, 8, 3), (32, 50, 8), (32, 7, 256)]:
            windowed = order.Windowed(size, 3, chunk, window, streams)
            epochs = [[windowed[e * size + slot] for slot in range(size)] for e in range(3)]
            for epoch in epochs:
                assert sorted(epoch) == list(range(size))
            if size >= 1000:
                assert len({tuple(epoch) for epoch in epochs}) == 3

    def test_a_stream_needs_few_chunks_at_a_time_and_each_once(self):
        size, chunk, window, streams = 100_000, 32, 128, 16
        windowed = order.Windowed(size, 0, chunk, window, streams)
        reads: collections.Counter[int] = collections.Counter()
        for stream in range(streams):
            chunks = [windowed[p] // chunk for p in range(stream, size // 2, streams)]
            for start in range(len(chunks) - window):
                assert len(set(chunks[start : start + window])) <= 2 * (window // chunk + 1)
            reads.update(set(chunks))
        # A chunk is read by more than one stream only where a stream's stretch ends.
        assert sum(count - 1 for count in reads.values()) <= streams

    def test_neighbours_part(self):
        """Within a window any place is as likely; a batch holds chunks from all over the set."""
        size, streams = 2**16, 16
        windowed = order.Windowed(size, 1, 32, 128, streams)
        batch = np.array([windowed[p] for p in range(1024)])
        assert len(np.unique(batch // 32)) > 1024 / 32
        assert abs(batch.mean() / size - 0.5) < 0.1
        after = np.array([windowed[p + streams] - windowed[p] for p in range(1024)])
        assert (after == 1).mean() < 0.05


class TestWeighted:
    def test_proportions_and_epochs_of_each_part(self):
        sizes, weights = (700, 30, 3), (6.0, 3.0, 1.0)
        parts = [order.Shuffled(size, 5, part) for part, size in enumerate(sizes)]
        mixed = order.Weighted(parts, weights, 5)
        drawn = np.array([mixed[p] for p in range(2 * order.Weighted.ROUND)])
        which = np.searchsorted(np.cumsum(sizes), drawn, side="right")
        assert mixed.slots == [6000, 3000, 1000]
        for part, first in enumerate((0, 700, 730)):
            own = drawn[which == part] - first
            assert len(own) == 2 * mixed.slots[part]
            assert own.tolist() == [parts[part][place] for place in range(len(own))]
        early = np.bincount(which[:1000], minlength=3)
        np.testing.assert_allclose(early, [600, 300, 100], atol=70)

    def test_streams_stay_streams(self):
        streams = 4
        parts = [order.Windowed(size, 0, 8, 16, streams, i) for i, size in enumerate((640, 320))]
        mixed = order.Weighted(parts, (2.0, 1.0), 0)
        assert mixed.streams == streams
        for stream in range(streams):
            own = [mixed[p] for p in range(stream, 2000 * streams, streams)]
            first = [example for example in own if example < 640]
            assert len({example // 8 for example in first[:80]}) <= 80 / 8 + 2 * (16 / 8 + 1)

    def test_rounding_loses_nothing(self):
        for weights in [(1, 1, 1), (1e-3, 7, 11.1), (400e6, 12e6, 1e5)]:
            parts = [order.Stored(3)] * len(weights)
            slots = order.Weighted(parts, weights, 0).slots
            assert sum(slots) == order.Weighted.ROUND
            exact = np.array(weights) / sum(weights) * order.Weighted.ROUND
            assert np.abs(np.array(slots) - exact).max() < 1

    @pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, -2.0), (1.0, 1e-6), (1.0, math.inf)])
    def test_impossible_weights(self, weights):
        with pytest.raises(UserError, match="weight"):
            order.Weighted([order.Stored(3)] * 2, weights, 0)
