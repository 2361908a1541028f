"""Describes a data set: image sizes, caption lengths, duplicates, rows that captions pack into.

    python -m clip_jax data stats "shards/*.tar"
    python -m clip_jax data stats gs://BUCKET/cc12m --sample=100000 --html=cc12m.html
    python -m clip_jax data stats tfds:coco_captions --json=coco.json

Image sizes are read from the headers of the files. Duplicates are exact: equal bytes of image
files, equal captions after the tokenizer's clean-up. With --sample, only duplicates within the
sample are counted. Memory: 18 bytes per pair, and three times that while duplicates are counted.
"""

import argparse
import functools
import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from clip_jax.common import commands
from clip_jax.curation import parallel, stats_report
from clip_jax.curation.check import make_tokenizer
from clip_jax.curation.stats_report import POINTS, QUANTITIES, Histogram
from clip_jax.data import arguments, bpe, images, order
from clip_jax.data.sources import reading
from clip_jax.data.sources.base import Example, Source
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.errors import BadExample, UserError
from clip_jax.storage import locations, writing

_FREQUENT = 10  # captions listed

# Simulated packing.
_ROW_LENGTHS = (80, 128)  # tokens in a row
_CAPTIONS = (32, 128, 512)  # packed together: those of one device and micro-batch
_BATCHES = 200
_ENOUGH_FOR = 0.99  # fraction of the batches


class Stats:
    """The counts of some examples.

    Attributes:
      histograms: one for each of `QUANTITIES`, by name.
      formats: number of image files by format; "pixels": stored as arrays.
      unusable: number of examples left out, by reason.
      image_bytes: size of all image files together.
      image_hashes: 64 bits per image.
      caption_hashes: 64 bits per caption.
      caption_counts: number of captions of each example; 0 for unusable ones.
    """

    def __init__(self) -> None:
        self.histograms = {name: Histogram() for name in QUANTITIES}
        self.formats: Counter[str] = Counter()
        self.unusable: Counter[str] = Counter()
        self.image_bytes = 0
        self.image_hashes = array("Q")
        self.caption_hashes = array("Q")
        self.caption_counts = array("H")

    def add(self, example: Example, tokenizer: Tokenizer) -> None:
        """Counts an example; raises BadExample where its image has no readable header."""
        form, width, height = _header(example)
        texts, data = example.captions.texts, _bytes(example)
        self.formats[form] += 1
        self.image_bytes += len(data)
        self.image_hashes.append(_hash(data))
        self.caption_counts.append(len(texts))
        sizes = (width, height, 100 * width / height, width * height, len(data), len(texts))
        for name, value in zip(QUANTITIES, sizes):
            self.histograms[name].add(value)
        ids = tokenizer.encode_batch(texts)[1] if texts else ()
        for text, length in zip(texts, ids):
            cleaned = _cleaned(text)
            self.caption_hashes.append(_hash(cleaned.encode("utf-8", "replace")))
            self.histograms["characters"].add(len(text))
            self.histograms["words"].add(len(cleaned.split()))
            self.histograms["ids"].add(length)

    def skip(self, reason: str) -> None:
        """Counts an example that cannot be used."""
        self.unusable[reason] += 1
        self.caption_counts.append(0)

    def merge(self, other: "Stats") -> None:
        """Adds the counts of the examples that follow."""
        for name, histogram in other.histograms.items():
            self.histograms[name].merge(histogram)
        self.formats += other.formats
        self.unusable += other.unusable
        self.image_bytes += other.image_bytes
        self.image_hashes += other.image_hashes
        self.caption_hashes += other.caption_hashes
        self.caption_counts += other.caption_counts


def main(argv: list[str]) -> None:
    """Runs the command."""
    options = _parser().parse_args(argv)
    figures, html = (name and locations.reachable(name) for name in (options.json, options.html))
    data = arguments.data(options.data, options, in_order=options.sample is None)
    source = data.open()
    indices = choose(len(source), options.sample, options.seed)
    stats = gather(source, data, indices, options)
    if not stats.image_hashes:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in stats.unusable.items())
        raise UserError(f"No example of {options.data} can be used: {reasons or 'it is empty'}.")
    summary = summarise(source, indices, stats, options)
    print(stats_report.table(summary))
    if figures:
        writing.write(figures, json.dumps(summary, indent=2) + "\n")
    if html:
        stats_report.write_page(html, summary, stats.histograms)


def _parser() -> argparse.ArgumentParser:
    parser = arguments.parser("stats", __doc__)
    add = parser.add_argument
    add("--sample", type=commands.at_least(1), metavar="N", help="examples drawn; default: all")
    add("--seed", type=commands.at_least(0), default=0, help="seed of the sample; default: 0")
    add("--json", metavar="FILE", help="writes all figures there")
    add("--html", metavar="FILE", help="writes a page with histograms there")
    add("--tokenizer", default="openai", help="tokenizer, see configs/default.py")
    add(
        "--context_length",
        type=commands.at_least(2),
        default=77,
        help="ids of a caption that a model sees; default: 77",
    )
    return parser


def choose(size: int, sample: int | None, seed: int) -> Sequence[int]:
    """Returns the indices of all examples, or of a random sample of them, rising."""
    if sample is None or sample >= size:
        return range(size)
    shuffled = order.Permutation(size, seed, epoch=0)
    return sorted(shuffled[place] for place in range(sample))


def gather(
    source: Source, data: arguments.Data, indices: Sequence[int], options: argparse.Namespace
) -> Stats:
    """Counts the examples, in parallel."""
    work = functools.partial(_count, options.tokenizer, options.context_length)
    stats, todo = Stats(), parallel.parts(indices)
    for part in parallel.map_parts(work, source, data, todo, options.workers, "reading"):
        stats.merge(part)
    return stats


def _count(tokenizer: str, context_length: int, source: Source, part: Sequence[int]) -> Stats:
    stats = Stats()
    for read in reading.in_order(source, part):
        try:
            stats.add(read(), make_tokenizer(tokenizer, context_length))
        except BadExample as bad:
            stats.skip(bad.reason)
    return stats


def summarise(
    source: Source, indices: Sequence[int], stats: Stats, options: argparse.Namespace
) -> dict[str, Any]:
    """Returns all figures of the report, ready for JSON."""
    ids = stats.histograms["ids"]
    captions = _repeats(stats.caption_hashes)
    return {
        "data": options.data,
        "examples": len(source),
        "seen": len(indices),
        "usable": len(stats.image_hashes),
        "unusable": dict(stats.unusable),
        "left_out_by_index": dict(getattr(source, "problems", {})),
        "image_bytes": stats.image_bytes,
        "formats": dict(stats.formats.most_common()),
        "captions": len(stats.caption_hashes),
        "percentiles": {
            name: {f"p{p}": value for p, value in zip(POINTS, histogram.percentiles(POINTS))}
            | {"mean": histogram.mean()}
            for name, histogram in stats.histograms.items()
            if len(histogram)
        },
        "context_length": options.context_length,
        "cut_captions": ids.fraction_above(options.context_length) if len(ids) else 0.0,
        "duplicate_captions": 1 - len(captions) / max(len(stats.caption_hashes), 1),
        "duplicate_images": 1 - len(_repeats(stats.image_hashes)) / len(stats.image_hashes),
        "frequent_captions": _frequent(source, indices, stats),
        "pack_rows": suggest_rows(ids, options.context_length) if len(ids) else [],
    }


def _repeats(hashes: array) -> np.ndarray:
    """Returns the number of times that each distinct hash occurs."""
    return np.unique(np.frombuffer(hashes, np.uint64), return_counts=True)[1]


def _frequent(source: Source, indices: Sequence[int], stats: Stats) -> list[dict[str, Any]]:
    """Returns the captions that occur most often, if more than once."""
    if not stats.caption_hashes:
        return []
    hashes = np.frombuffer(stats.caption_hashes, np.uint64)
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    ends = np.cumsum(np.frombuffer(stats.caption_counts, np.uint16), dtype=np.int64)
    listed = []
    for rank in np.argsort(-counts, kind="stable")[:_FREQUENT]:
        if counts[rank] > 1:
            example = int(np.searchsorted(ends, first[rank], side="right"))
            texts = source[indices[example]].captions.texts
            text = texts[int(first[rank] - ends[example])]  # counted from the end of its texts
            listed.append({"caption": text, "count": int(counts[rank])})
    return listed


def _header(example: Example) -> tuple[str, int, int]:
    """Returns format, width and height of the image; raises BadExample where it has none."""
    if not isinstance(example.image, bytes):
        height, width, _ = example.image.shape
        return "pixels", width, height
    try:
        with images.open_header(example.image) as image:
            return image.format or "unknown", *image.size
    except Exception as error:  # Pillow raises any kind for a damaged header
        raise BadExample("unreadable image", example.key, str(error)) from None


def _bytes(example: Example) -> bytes:
    return example.image if isinstance(example.image, bytes) else example.image.tobytes()


def _cleaned(text: str) -> str:
    return " ".join(bpe.clean(text).split())


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


# ---- Rows of a packed text tower -----------------------------------------------------------------


def suggest_rows(ids: Histogram, context_length: int) -> list[dict[str, Any]]:
    """Suggests values for model.packing.rows that suffice for 99 of 100 batches, by simulation.

    Args:
      ids: numbers of ids of captions, start and end token included.
      context_length: number of ids that longer captions are cut to.

    Returns:
      For each number of captions that are packed together a row: "captions", and by the length
      of a row ("80") the rows per caption, rounded up to hundredths.
    """
    values, numbers = ids.values()
    rng = np.random.default_rng(0)
    lengths = [length for length in _ROW_LENGTHS if length >= context_length]
    suggested = []
    for captions in _CAPTIONS:
        drawn = rng.choice(values, (_BATCHES, captions), p=numbers / numbers.sum())
        drawn = np.minimum(drawn, context_length).astype(np.int32)
        row: dict[str, Any] = {"captions": captions}
        for length in lengths:
            rows = rows_used(drawn, context_length, length)
            most = np.quantile(rows, _ENOUGH_FOR, method="higher")
            row[str(length)] = float(np.ceil(100 * most / captions) / 100)
        suggested.append(row)
    return suggested


def rows_used(
    ids: Int32[np.ndarray, "batches captions"], context_length: int, length: int
) -> Int32[np.ndarray, " batches"]:
    """Counts the rows that each batch of captions packs into.

    Args:
      ids: number of ids of each caption, at most `context_length`.
      context_length: tokens in an unpacked row.
      length: tokens in a packed row.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an accelerator may be busy training
    import jax

    from clip_jax.models import packing

    @jax.jit
    def count(ends: jax.Array) -> jax.Array:
        # A caption ends with its largest id, so one mark stands for it.
        tokens = jax.nn.one_hot(ends, context_length, dtype=np.int32)
        return jax.vmap(lambda batch: packing.place(batch, length).row.max() + 1)(tokens)

    return np.asarray(count(ids - 1))
