"""Finds near-duplicate images: re-encoded, resized, slightly cropped or, by embeddings, similar.

    python -m clip_jax data dedup "shards/*.tar"
    python -m clip_jax data dedup "shards/*.tar" --against="test/*.tar" --out=overlap
    python -m clip_jax data dedup "shards/*.tar" --checkpoint=runs/vit_b32 --cosine=0.95
    python -m clip_jax data pack "shards/*.tar" clean --keep=dedup/keep.txt

By default images are compared by a perceptual hash of 64 bits and by their colours in nine fields.
With --checkpoint, a trained model embeds them; with --embeddings, a .npy file has a row for each.
The first of several near-duplicates is kept, the others are dropped. With --against, images with a
near-duplicate in the other set are dropped, and the other set stays whole. This keeps a test set
out of the training data, for example.

Writes to --out:
    duplicates.parquet  key of each dropped image, key of the one kept, distance (bits, or
                        1 - cosine), number of the group
    keep.txt            the keys of all others, for pack --keep
    pairs.html          pairs side by side, the least similar first, to judge the threshold
"""

import argparse
import logging
import pathlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from clip_jax.common import commands
from clip_jax.curation import dedup_features, dedup_search
from clip_jax.curation.check import decode
from clip_jax.curation.dedup_features import Features
from clip_jax.curation.dedup_search import Matches
from clip_jax.data import arguments
from clip_jax.data.sources.base import Source
from clip_jax.errors import BadExample, UserError
from clip_jax.storage import locations, writing


def main(argv: list[str]) -> None:
    """Runs the command."""
    options = _options(argv)
    output = locations.reachable(options.out)
    source, features = _read(options.data, options.embeddings, options)
    other_source, others = source, None
    if options.against:
        other_source, others = _read(options.against, options.against_embeddings, options)
    reference = None if others is None else others.values
    if options.checkpoint or options.embeddings:
        matches = dedup_search.match_embeddings(features.values, options.cosine, reference)
    else:
        matches = dedup_search.match_signatures(
            features.values, options.threshold, options.colours, reference
        )
    kept_features = features if others is None else others
    table = _write(output, features, kept_features, matches)
    pairs = _show(options.show, (source, features), (other_source, kept_features), matches)
    _write_page(output / "pairs.html", pairs, options, table)
    print(_report(options, features, matches, output))


def _options(argv: list[str]) -> argparse.Namespace:
    parser = arguments.parser("dedup", __doc__)
    add, at_least = parser.add_argument, commands.at_least
    add("--against", default="", metavar="DATA", help="other set, from which nothing is dropped")
    add("--threshold", type=at_least(0), default=6, help="bits that may differ, of 64; default: 6")
    add(
        "--colours",
        type=at_least(0),
        default=16,
        help="levels by which each mean colour may differ, of 255; default: 16",
    )
    add("--checkpoint", default="", metavar="WORKDIR", help="compares by the model's embeddings")
    add("--embeddings", default="", metavar="FILE", help="compares by these: .npy, [n, d]")
    add("--against_embeddings", default="", metavar="FILE", help="those of --against")
    add(
        "--cosine",
        type=commands.fraction,
        default=0.95,
        help="least cosine of near-duplicates; default: 0.95",
    )
    add("--out", default="dedup", metavar="DIR", help="default: dedup")
    add("--show", type=at_least(0), default=50, help="pairs on the page; default: 50")
    options = parser.parse_args(argv)
    if options.checkpoint and options.embeddings:
        parser.error("--checkpoint and --embeddings exclude each other")
    if bool(options.against and options.embeddings) != bool(options.against_embeddings):
        parser.error("--against_embeddings goes with --against and --embeddings")
    if not 0 <= options.threshold <= 24:
        parser.error("--threshold is at most 24: unrelated images differ in 32 bits or so")
    if options.cosine == 0:
        parser.error("--cosine is above 0")
    return options


def _read(name: str, embeddings: str, options: argparse.Namespace) -> tuple[Source, Features]:
    data = arguments.data(name, options)
    source = data.open()
    if options.checkpoint:
        found = dedup_features.from_model(source, data, options.workers, options.checkpoint)
    elif embeddings:
        found = dedup_features.from_file(source, data, options.workers, embeddings)
    else:
        found = dedup_features.signatures(source, data, options.workers)
    if not len(found.keys):
        raise UserError(f"No image of {name} can be used: {dict(found.unusable)}.")
    return source, _without_repeated_keys(found, name)


def _without_repeated_keys(found: Features, name: str) -> Features:
    """Returns the features of the first image of each key, since a list of keys names no other."""
    rows = pa.table({"key": found.keys, "row": np.arange(len(found.keys))})
    first = rows.group_by("key", use_threads=False).aggregate([("row", "min")])["row_min"]
    if len(first) == len(rows):
        return found
    kept = np.sort(first.to_numpy())
    logging.warning(
        "%d of the %d examples of %s have the key of an earlier one: they are not compared, and "
        "are kept or dropped with it",
        len(rows) - len(kept),
        len(rows),
        name,
    )
    keys, values = found.keys.take(pa.array(kept)), found.values[kept]
    return Features(found.indices[kept], keys, values, found.unusable)


def _write(
    output: epath.Path, features: Features, kept_features: Features, matches: Matches
) -> pa.Table:
    """Writes duplicates.parquet and keep.txt; returns the former."""
    dropped = np.flatnonzero(matches.kept >= 0)
    kept = matches.kept[dropped]
    columns = {
        "key": features.keys.take(pa.array(dropped)),
        "kept_key": kept_features.keys.take(pa.array(kept)),
        "distance": matches.distance[dropped],
        "group": np.unique(kept, return_inverse=True)[1],
    }
    table = pa.table(columns)
    with writing.replacing(output / "duplicates.parquet") as temporary:
        pq.write_table(table, temporary)
    with writing.replacing(output / "keep.txt") as temporary, temporary.open("wb") as file:
        for chunk in features.keys.filter(pa.array(matches.kept < 0)).chunks:
            file.write("".join(f"{key}\n" for key in chunk.to_pylist()).encode())
    return table


def _show(
    count: int,
    dropped: tuple[Source, Features],
    kept: tuple[Source, Features],
    matches: Matches,
) -> Iterator[dict[str, Any]]:
    """Yields the least similar pairs, with their images."""
    found = np.flatnonzero(matches.kept >= 0)
    for place in found[np.argsort(-matches.distance[found], kind="stable")][:count]:
        sides = []
        for (source, features), at in ((dropped, place), (kept, matches.kept[place])):
            try:
                example = source[int(features.indices[at])]
                image = decode(example)
            except BadExample:  # it could be read a while ago, or only its embedding was
                break
            sides.append({"key": example.key, "text": example.text, "image": image})
        if len(sides) == 2:
            yield {"distance": float(matches.distance[place]), "sides": sides}


def _write_page(
    path: epath.Path,
    pairs: Iterator[dict[str, Any]],
    options: argparse.Namespace,
    table: pa.Table,
) -> None:
    from clip_jax.common.pages import page  # with matplotlib

    distances = Counter(float(f"{distance:.2f}") for distance in table["distance"].to_pylist())
    page.write(
        path,
        pathlib.Path(__file__).with_name("dedup.html.jinja"),
        title=f"{options.data}: {table.num_rows:,} near-duplicate images",
        unit="1 - cosine" if options.checkpoint or options.embeddings else "bits",
        pairs=list(pairs),
        distances=sorted(distances.items()),
    )


def _report(
    options: argparse.Namespace, features: Features, matches: Matches, output: epath.Path
) -> str:
    dropped = int((matches.kept >= 0).sum())
    total = len(matches.kept)
    where = f"one of {options.against}" if options.against else "an earlier one"
    lines = [
        f"{options.data}: of {total:,} images {dropped:,} ({dropped / total:.2%}) are "
        f"near-duplicates of {where}; {total - dropped:,} are kept."
    ]
    if features.unusable:
        counts = ", ".join(f"{n:,} {reason}" for reason, n in features.unusable.most_common())
        lines.append(f"Unusable, and in no list: {counts}")
    lines += [
        f"Look at {output / 'pairs.html'}. To write a set without them:",
        f"  python -m clip_jax data pack '{options.data}' OUTPUT --keep={output / 'keep.txt'}",
    ]
    return "\n".join(lines)
