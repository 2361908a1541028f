"""Checks every example as training would use it: reads, decodes, tokenises.

    python -m clip_jax data check "shards/*.tar"
    python -m clip_jax data check gs://BUCKET/cc12m --workers=64 --max_skipped=0.01
    python -m clip_jax data check tfds:coco_captions --split=val

Prints what is wrong, by reason, and writes to --out:
    bad.jsonl     index, key, reason and detail of every example that cannot be used
    summary.json  the counts

Exit status: 0 if no more than --max_skipped is unusable, 1 otherwise, 2 for a user error.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from clip_jax.common import commands
from clip_jax.common.formatting import aligned
from clip_jax.curation import parallel
from clip_jax.data import arguments, images, tokenizer
from clip_jax.data.sources import reading
from clip_jax.data.sources.base import Example, Source
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.errors import BadExample
from clip_jax.storage import locations, writing

_NAMED = 3  # keys listed for each reason


@dataclasses.dataclass
class Summary:
    """The counts of a check.

    Attributes:
      data: name of the data on the command line.
      examples: number of examples tried.
      seconds: time taken.
      reasons: number of unusable examples by reason.
      first_keys: keys of the first unusable examples of each reason.
      index: number of problems of the shards or the listing, by reason, found before any example
        was read.
    """

    data: str
    examples: int = 0
    seconds: float = 0.0
    reasons: Counter[str] = dataclasses.field(default_factory=Counter)
    first_keys: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    index: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def fraction(self) -> float:
        """The unusable fraction of all that was found."""
        lost = self.reasons.total() + self.index.total()
        return lost / max(self.examples + self.index.total(), 1)

    def add(self, bad: dict[str, Any]) -> None:
        """Counts an example that cannot be used."""
        self.reasons[bad["reason"]] += 1
        keys = self.first_keys.setdefault(bad["reason"], [])
        if len(keys) < _NAMED:
            keys.append(bad["key"])


def main(argv: list[str]) -> None:
    """Runs the command and ends the process with its status."""
    parser = arguments.parser("check", __doc__)
    parser.add_argument("--out", default="check", metavar="DIR", help="default: check")
    parser.add_argument(
        "--max_skipped",
        type=commands.fraction,
        default=0.0,
        metavar="FRACTION",
        help="fraction that may be unusable; a damaged shard or repeated key counts as one",
    )
    parser.add_argument("--tokenizer", default="openai", help="tokenizer, see configs/default.py")
    options = parser.parse_args(argv)
    data = arguments.data(options.data, options)
    output = locations.reachable(options.out)
    summary = Summary(options.data)
    start = time.perf_counter()
    with writing.replacing(output / "bad.jsonl") as temporary, temporary.open("w") as file:
        for bad in _examine(data, options, summary):
            summary.add(bad)
            file.write(json.dumps(bad) + "\n")
    summary.seconds = time.perf_counter() - start
    figures = vars(summary) | {"fraction": summary.fraction}
    writing.write(output / "summary.json", json.dumps(figures, indent=2) + "\n")
    print(_table(summary))
    if summary.reasons:
        print(f"\nAll of them: {output / 'bad.jsonl'}")
    sys.exit(0 if summary.fraction <= options.max_skipped else 1)


def try_example(example: Example, tokens: Tokenizer) -> Image.Image:
    """Returns the image, upright and RGB, of an example that training can use.

    Every caption is tried, since training may draw any.

    Raises:
      BadExample: training might not be able to use the example.
    """
    for text in example.captions.texts:
        row, _ = tokens.encode(text)
        if tokens.is_empty(row):  # as after "&nbsp;"
            raise BadExample("empty caption", example.key)
    return decode(example)


def decode(example: Example) -> Image.Image:
    """Returns the image, upright and RGB; raises BadExample where it cannot be decoded."""
    if isinstance(example.image, bytes):
        return images.decode(example.image, example.key)
    return Image.fromarray(example.image)


@functools.lru_cache(maxsize=1)
def make_tokenizer(name: str, context_length: int) -> Tokenizer:
    """Returns the tokenizer of a process, which is made once."""
    return tokenizer.create(name, context_length)


def _examine(
    data: arguments.Data, options: argparse.Namespace, summary: Summary
) -> Iterator[dict[str, Any]]:
    """Yields the examples that cannot be used; sets the number of examples of the summary."""
    source = data.open()
    summary.examples, summary.index = len(source), Counter(getattr(source, "problems", {}))
    todo = parallel.parts(range(len(source)))
    work = functools.partial(_check_part, options.tokenizer)
    for found in parallel.map_parts(work, source, data, todo, options.workers, "checking"):
        yield from found


def _check_part(name: str, source: Source, part: Sequence[int]) -> list[dict[str, Any]]:
    """Returns the unusable examples of a part; `name` is that of the tokenizer."""
    found = []
    for index, read in zip(part, reading.in_order(source, part)):
        try:
            try_example(read(), make_tokenizer(name, 77))
        except BadExample as bad:
            fields = {"key": bad.key, "reason": bad.reason, "detail": bad.detail}
            found.append({"index": int(index)} | fields)
    return found


def _table(summary: Summary) -> str:
    rate = summary.examples / max(summary.seconds, 1e-9)
    unusable = summary.reasons.total()
    blocks = [
        f"{summary.data}: {summary.examples:,} examples tried in {summary.seconds:,.0f} s "
        f"({rate:,.0f}/s), {unusable:,} of them unusable."
    ]
    if unusable:
        rows = [("  reason", "examples", "first")]
        for reason, count in summary.reasons.most_common():
            rows.append((f"  {reason}", f"{count:,}", ", ".join(summary.first_keys[reason])))
        blocks.append(aligned(rows, "<><"))
    if summary.index:
        rows = [("  found before any was read", "number")]
        rows += [(f"  {reason}", f"{count:,}") for reason, count in summary.index.most_common()]
        blocks.append(aligned(rows, "<>"))
    return "\n\n".join(blocks)
