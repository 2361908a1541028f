"""What is in a data set: image sizes, caption lengths, duplicates, rows that captions pack into.

    python -m clip_jax data stats "shards/*.tar"
    python -m clip_jax data stats gs://BUCKET/cc12m --sample=100000 --html=cc12m.html
    python -m clip_jax data stats tfds:coco_captions --json=coco.json

Image sizes are read from the headers of the files. Duplicates are exact: equal bytes of image
files, equal captions after the tokenizer's clean-up; in a sample only those within it are seen.
Memory: 18 bytes per pair, and three times that while duplicates are counted.
"""

import argparse
import functools
import hashlib
import io
import json
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_jax.curation.tally import POINTS, QUANTITIES, Tally
from clip_jax.data import arguments
from clip_jax.errors import BadExample, UserError
from clip_jax.storage import locations, writing

if TYPE_CHECKING:
    from clip_jax.data.sources.base import Example, Source
    from clip_jax.data.tokenizer import Tokenizer

# What is tallied, and its name for people.
_FREQUENT = 10  # captions listed


class Found:
    """What examples are like.

    Attributes:
      tallies: of `QUANTITIES`, by name.
      formats: of the image files; "pixels" where there are arrays instead.
      unusable: examples left out, by reason.
      image_bytes: of all image files.
      image_hashes: 64 bits per image.
      caption_hashes: 64 bits per caption.
      owners: how many captions each example has, unusable ones 0.
    """

    def __init__(self) -> None:
        self.tallies = {name: Tally() for name in QUANTITIES}
        self.formats: Counter[str] = Counter()
        self.unusable: Counter[str] = Counter()
        self.image_bytes = 0
        self.image_hashes = array("Q")
        self.caption_hashes = array("Q")
        self.owners = array("H")

    def add(self, example: "Example", tokenizer: "Tokenizer") -> None:
        """Counts an example; BadExample where its image has no readable header."""
        form, width, height = _header(example)
        texts, data = example.captions.texts, _bytes(example)
        self.formats[form] += 1
        self.image_bytes += len(data)
        self.image_hashes.append(_hash(data))
        self.owners.append(len(texts))
        sizes = (width, height, 100 * width / height, width * height, len(data), len(texts))
        for name, value in zip(QUANTITIES, sizes):
            self.tallies[name].add(value)
        ids = tokenizer.encode_batch(texts)[1] if texts else ()
        for text, length in zip(texts, ids):
            cleaned = _cleaned(text)
            self.caption_hashes.append(_hash(cleaned.encode("utf-8", "replace")))
            self.tallies["characters"].add(len(text))
            self.tallies["words"].add(len(cleaned.split()))
            self.tallies["ids"].add(length)

    def skip(self, reason: str) -> None:
        """Counts an example that cannot be used."""
        self.unusable[reason] += 1
        self.owners.append(0)

    def merge(self, other: "Found") -> None:
        """Adds the examples that follow."""
        for name, tally in other.tallies.items():
            self.tallies[name].merge(tally)
        self.formats += other.formats
        self.unusable += other.unusable
        self.image_bytes += other.image_bytes
        self.image_hashes += other.image_hashes
        self.caption_hashes += other.caption_hashes
        self.owners += other.owners


def main(argv: list[str]) -> None:
    """Runs the command."""
    options = _parser().parse_args(argv)
    figures, html = (name and locations.reachable(name) for name in (options.json, options.html))
    data = arguments.data(options.data, options, in_order=options.sample is None)
    source = data.open()
    indices = choose(len(source), options.sample, options.seed)
    found = gather(source, data, indices, options)
    if not found.image_hashes:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in found.unusable.items())
        raise UserError(f"No example of {options.data} can be used: {reasons or 'it is empty'}.")

    from clip_jax.curation import stats_report

    summary = summarise(source, indices, found, options)
    print(stats_report.table(summary))
    if figures:
        writing.write(figures, json.dumps(summary, indent=2) + "\n")
    if html:
        stats_report.write_page(html, summary, found.tallies)


def _parser() -> argparse.ArgumentParser:
    parser = arguments.parser("stats", __doc__)
    add = parser.add_argument
    add("--sample", type=arguments.at_least(1), metavar="N", help="examples drawn; default: all")
    add("--seed", type=arguments.at_least(0), default=0, help="of the sample; default: 0")
    add("--json", metavar="FILE", help="writes all figures there")
    add("--html", metavar="FILE", help="writes a page with histograms there")
    add("--tokenizer", default="openai", help="as in configs/default.py")
    add(
        "--context_length",
        type=arguments.at_least(2),
        default=77,
        help="ids of a caption that a model sees; default: 77",
    )
    return parser


def choose(size: int, sample: int | None, seed: int) -> Sequence[int]:
    """Indices of all examples, or of a random sample of them, rising."""
    if sample is None or sample >= size:
        return range(size)
    from clip_jax.data.order import Permutation

    shuffled = Permutation(size, seed, epoch=0)
    return sorted(shuffled[place] for place in range(sample))


def gather(
    source: "Source", data: arguments.Data, indices: Sequence[int], options: argparse.Namespace
) -> Found:
    """Reads the examples, in parallel."""
    from clip_jax.curation import parallel

    work = functools.partial(_examine, options.tokenizer, options.context_length)
    found, todo = Found(), parallel.parts(indices)
    for part in parallel.map_parts(work, source, data, todo, options.workers, "reading"):
        found.merge(part)
    return found


def _examine(tokenizer: str, context_length: int, source: "Source", part: Sequence[int]) -> Found:
    from clip_jax.curation.check import make_tokenizer
    from clip_jax.data.sources import reading

    found = Found()
    for read in reading.in_turn(source, part):
        try:
            found.add(read(), make_tokenizer(tokenizer, context_length))
        except BadExample as bad:
            found.skip(bad.reason)
    return found


def summarise(
    source: "Source", indices: Sequence[int], found: Found, options: argparse.Namespace
) -> dict[str, Any]:
    """All figures of the report, ready for JSON; shares are fractions in [0, 1]."""
    from clip_jax.curation import pack_rows

    ids = found.tallies["ids"]
    captions = _repeats(found.caption_hashes)
    return {
        "data": options.data,
        "examples": len(source),
        "seen": len(indices),
        "usable": len(found.image_hashes),
        "unusable": dict(found.unusable),
        "left_out_by_index": dict(getattr(source, "problems", {})),
        "image_bytes": found.image_bytes,
        "formats": dict(found.formats.most_common()),
        "captions": len(found.caption_hashes),
        "percentiles": {
            name: {f"p{p}": value for p, value in zip(POINTS, tally.percentiles(POINTS))}
            | {"mean": tally.mean()}
            for name, tally in found.tallies.items()
            if len(tally)
        },
        "context_length": options.context_length,
        "cut_captions": ids.share_above(options.context_length) if len(ids) else 0.0,
        "duplicate_captions": 1 - len(captions) / max(len(found.caption_hashes), 1),
        "duplicate_images": 1 - len(_repeats(found.image_hashes)) / len(found.image_hashes),
        "frequent_captions": _frequent(source, indices, found),
        "pack_rows": pack_rows.suggest(ids, options.context_length) if len(ids) else [],
    }


def _repeats(hashes: array) -> np.ndarray:
    """How often each different hash occurs."""
    return np.unique(np.frombuffer(hashes, np.uint64), return_counts=True)[1]


def _frequent(source: "Source", indices: Sequence[int], found: Found) -> list[dict[str, Any]]:
    """The captions that occur most often, if more than once."""
    if not found.caption_hashes:
        return []
    hashes = np.frombuffer(found.caption_hashes, np.uint64)
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    ends = np.cumsum(np.frombuffer(found.owners, np.uint16), dtype=np.int64)
    listed = []
    for rank in np.argsort(-counts, kind="stable")[:_FREQUENT]:
        if counts[rank] > 1:
            owner = int(np.searchsorted(ends, first[rank], side="right"))
            texts = source[indices[owner]].captions.texts
            text = texts[int(first[rank] - ends[owner])]  # counted from the end of its owner's
            listed.append({"caption": text, "count": int(counts[rank])})
    return listed


def _header(example: "Example") -> tuple[str, int, int]:
    """Format, width and height; BadExample where the file tells none."""
    from PIL import Image

    if not isinstance(example.image, bytes):
        height, width, _ = example.image.shape
        return "pixels", width, height
    try:
        with Image.open(io.BytesIO(example.image)) as image:
            return image.format or "unknown", *image.size
    except Exception as error:  # a damaged header makes Pillow raise anything
        raise BadExample("unreadable image", example.key, str(error)) from None


def _bytes(example: "Example") -> bytes:
    return example.image if isinstance(example.image, bytes) else example.image.tobytes()


def _cleaned(text: str) -> str:
    from clip_jax.data import bpe

    return " ".join(bpe.clean(text).split())


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
