"""The figures of `data stats` as a table to print and as a page with histograms."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from clip_jax.common.formatting import aligned, percent, short
from clip_jax.common.pages import curves, page
from clip_jax.curation.tally import POINTS, QUANTITIES, Tally

_BINS = 60


@dataclasses.dataclass(frozen=True)
class Table:
    """A title and rows of cells, the first of them the header; the first column is text."""

    title: str
    rows: Sequence[Sequence[str]]


def table(summary: Mapping[str, Any]) -> str:
    """Everything, ready to print."""
    blocks = ["\n".join(_facts(summary))]
    for one in _tables(summary):
        body = [["  " + row[0], *row[1:]] for row in one.rows]
        blocks.append(f"{one.title}\n" + aligned(body, "<" + ">" * (len(body[0]) - 1)))
    return "\n\n".join(blocks)


def write_page(path: epath.Path, summary: Mapping[str, Any], tallies: Mapping[str, Tally]) -> None:
    """Writes everything as a page; the tallies become its histograms."""
    drawn = [
        {"title": title, "svg": _histogram(tallies[name], title)}
        for name, title in QUANTITIES.items()
        if len(tallies[name].values()[0]) > 1
    ]
    page.write(
        path,
        Path(__file__).with_name("stats.html.jinja"),
        title=summary["data"],
        facts=_facts(summary),
        plots=drawn,
        tables=_tables(summary),
    )


def _histogram(tally: Tally, title: str):
    middles, shares = tally.histogram(_BINS)
    label = f"{title}: median {short(tally.percentiles([50])[0])}"
    return curves.draw([curves.Series(title, middles, shares)], label, percent=True)


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
