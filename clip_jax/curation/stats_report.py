"""The figures of `data stats`: histograms of values, a table to print, a page."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float64, Int64

from clip_jax.common.formatting import aligned, percent, short

_BINS = 60

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


class Histogram:
    """Counts of values; those from 10,000 on are rounded to four digits, to bound the memory."""

    def __init__(self) -> None:
        self._counts: Counter[float] = Counter()

    def add(self, value: float) -> None:
        self._counts[float(f"{value:.4g}")] += 1

    def merge(self, other: "Histogram") -> None:
        self._counts.update(other._counts)

    def __len__(self) -> int:
        """The number of values that were added."""
        return self._counts.total()

    def percentiles(self, points: Sequence[float]) -> list[float]:
        """Returns the percentile of the values at each of `points`, in per cent."""
        values, numbers = self.values()
        ranks = np.maximum(np.ceil(np.array(points) / 100 * numbers.sum()), 1)
        return values[np.searchsorted(np.cumsum(numbers), ranks)].tolist()

    def mean(self) -> float:
        values, numbers = self.values()
        return float(values @ numbers / numbers.sum())

    def fraction_above(self, limit: float) -> float:
        """Returns the fraction of the values that exceed `limit`."""
        values, numbers = self.values()
        return float(numbers[values > limit].sum() / numbers.sum())

    def bin(self, bins: int) -> tuple[Int64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
        """Counts the values in bins of equal width, the largest half per cent left out.

        Args:
          bins: number of bins at most; none is narrower than 1.

        Returns:
          The middles of the bins; the fractions of all values in them.
        """
        values, numbers = self.values()
        low, high = values[0], self.percentiles([99.5])[0]
        bins = int(min(bins, np.ceil(high - low) + 1))
        edges = np.linspace(low - 0.5, high + 0.5, bins + 1)
        fractions = np.histogram(values, edges, weights=numbers)[0] / numbers.sum()
        return np.round((edges[1:] + edges[:-1]) / 2).astype(np.int64), fractions

    def values(self) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
        """Returns the distinct values, rising, and the count of each."""
        values = np.array(sorted(self._counts))
        return values, np.array([self._counts[value] for value in values.tolist()], np.float64)


# ---- Table and page ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Table:
    """A title and rows of cells; the first row is the header, the first column is text."""

    title: str
    rows: Sequence[Sequence[str]]


def table(summary: Mapping[str, Any]) -> str:
    """Formats all figures as text."""
    blocks = ["\n".join(_facts(summary))]
    for one in _tables(summary):
        body = [["  " + row[0], *row[1:]] for row in one.rows]
        blocks.append(f"{one.title}\n" + aligned(body, "<" + ">" * (len(body[0]) - 1)))
    return "\n\n".join(blocks)


def write_page(
    path: epath.Path, summary: Mapping[str, Any], histograms: Mapping[str, Histogram]
) -> None:
    """Writes all figures as a page with histograms."""
    from clip_jax.common.pages import curves, page  # with matplotlib

    drawn = []
    for name, title in QUANTITIES.items():
        histogram = histograms[name]
        if len(histogram.values()[0]) > 1:
            middles, fractions = histogram.bin(_BINS)
            label = f"{title}: median {short(histogram.percentiles([50])[0])}"
            plot = curves.draw([curves.Series(title, middles, fractions)], label, percent=True)
            drawn.append({"title": title, "svg": plot})
    page.write(
        path,
        Path(__file__).with_name("stats.html.jinja"),
        title=summary["data"],
        facts=_facts(summary),
        plots=drawn,
        tables=_tables(summary),
    )


def _facts(summary: Mapping[str, Any]) -> list[str]:
    seen, total = f"{summary['seen']:,}", f"{summary['examples']:,}"
    if seen != total:
        seen = f"{seen} (drawn from {total})"
    usable, captions = summary["usable"], summary["captions"]
    formats = ", ".join(
        f"{name} {percent(count / usable)}" for name, count in summary["formats"].items()
    )
    lines = [
        f"{summary['data']}: {seen} examples, {usable:,} usable; {captions:,} "
        f"captions; {summary['image_bytes'] / 2**20:,.1f} MiB of images ({formats})",
        f"Images that repeat the bytes of another: {percent(summary['duplicate_images'])}. "
        f"Captions that repeat another: {percent(summary['duplicate_captions'])}. "
        f"Longer than {summary['context_length']} ids, cut: {percent(summary['cut_captions'])}",
    ]
    for name, title in (("unusable", "Unusable"), ("left_out_by_index", "Found by the index")):
        if summary[name]:
            counts = ", ".join(f"{count:,} {reason}" for reason, count in summary[name].items())
            lines.append(f"{title}: {counts}")
    return lines


def _tables(summary: Mapping[str, Any]) -> list[Table]:
    columns = [f"p{point}" for point in POINTS] + ["mean"]
    spread = [
        [QUANTITIES[name], *(short(values[column]) for column in columns)]
        for name, values in summary["percentiles"].items()
    ]
    titles = ["least", *(f"{point} %" for point in POINTS[1:-1]), "most", "mean"]
    tables = [Table("Percentiles", [["", *titles], *spread])]
    if summary["frequent_captions"]:
        rows = [
            [f"{row['caption']:.70}", f"{row['count']:,}"] for row in summary["frequent_captions"]
        ]
        tables.append(Table("Most frequent captions", [["caption", "times"], *rows]))
    if summary["pack_rows"]:
        lengths = [name for name in summary["pack_rows"][0] if name != "captions"]
        header = ["captions of a device and micro-batch", *(f"length {n}" for n in lengths)]
        rows = [
            [f"{row['captions']}", *(f"{row[name]:.2f}" for name in lengths)]
            for row in summary["pack_rows"]
        ]
        title = "model.packing.rows by model.packing.length: suffices for 99 of 100 batches"
        tables.append(Table(title, [header, *rows]))
    return tables
