"""How often each value was seen, in little memory however many there are."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

QUANTITIES = {
    "width": "width, pixels",
    "height": "height, pixels",
    "aspect": "width, % of height",
    "pixels": "width x height",
    "bytes": "bytes of image file",
    "captions": "captions of image",
    "characters": "characters of caption",
    "words": "words of caption",
    "ids": "token ids of caption",
}
POINTS = (0, 1, 5, 25, 50, 75, 95, 99, 100)  # per cent


class Tally:
    """Counts numbers, those from 10,000 on rounded to four digits, so that keys stay few."""

    def __init__(self) -> None:
        self._counts: Counter[float] = Counter()

    def add(self, value: float) -> None:
        self._counts[float(f"{value:.4g}")] += 1

    def merge(self, other: "Tally") -> None:
        self._counts.update(other._counts)

    def __len__(self) -> int:
        """How many numbers were added."""
        return self._counts.total()

    def percentiles(self, points: Sequence[float]) -> list[float]:
        """The least value that so many per cent do not exceed, for each of `points`."""
        values, numbers = self.values()
        ranks = np.maximum(np.ceil(np.array(points) / 100 * numbers.sum()), 1)
        return values[np.searchsorted(np.cumsum(numbers), ranks)].tolist()

    def mean(self) -> float:
        values, numbers = self.values()
        return float(values @ numbers / numbers.sum())

    def share_above(self, limit: float) -> float:
        """Share of the values that exceed `limit`, in [0, 1]."""
        values, numbers = self.values()
        return float(numbers[values > limit].sum() / numbers.sum())

    def histogram(self, bins: int) -> tuple[np.ndarray, np.ndarray]:
        """Shares of the values in bins of equal width, the largest half per cent left out.

        Returns:
          int64 [n], middles of the bins; float64 [n], shares in [0, 1]. There are at most `bins`,
          and none is narrower than 1.
        """
        values, numbers = self.values()
        low, high = values[0], self.percentiles([99.5])[0]
        bins = int(min(bins, np.ceil(high - low) + 1))
        edges = np.linspace(low - 0.5, high + 0.5, bins + 1)
        shares = np.histogram(values, edges, weights=numbers)[0] / numbers.sum()
        return np.round((edges[1:] + edges[:-1]) / 2).astype(np.int64), shares

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """Different values, rising, and how often each was seen: float64 [n] both."""
        values = np.array(sorted(self._counts))
        return values, np.array([self._counts[value] for value in values.tolist()], np.float64)
