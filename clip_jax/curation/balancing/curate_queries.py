"""Builds a list of queries, one a line, normalised as captions will be.

The sources are used in this order, until there are --limit queries: the list of --also, the synsets
of WordNet, the frequent words of --text (most frequent first), its pairs of words (by pointwise
mutual information, highest first), titles (most viewed first).

  python -m clip_jax data curate queries --text='wiki/*.parquet' --wordnet=dict \\
      --titles=views.tsv --min_views=70 --out=queries.txt

Text is parquet, .jsonl, .csv, .tsv or .txt with sentences, paragraphs or whole articles as rows. It
needs temporary disk space, in TMPDIR, as much as the text takes.
"""

import argparse
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from clip_jax.common import commands
from clip_jax.curation.balancing import pairs, phrases, queries
from clip_jax.curation.balancing.readers import Columns
from clip_jax.errors import UserError
from clip_jax.storage import locations, remote, writing

_ARTICLES = 4096  # rows of text at a time


def main(arguments: list[str]) -> None:
    """Runs the command."""
    args = _parser().parse_args(arguments)
    if not (args.text or args.titles or args.wordnet or args.also):
        raise UserError("No queries without --text, --titles, --wordnet or --also; see --help.")
    out = locations.reachable(args.out)
    if not remote.is_remote(out) and not out.parent.is_dir():
        raise UserError(f"--out={args.out} cannot be written: there is no such directory.")
    entries: list[str] = []
    for name, found in _sources(args):
        entries = queries.distinct([*entries, *found]).to_pylist()
        print(f"{name:<10}{len(found):>12,} found {len(entries):>12,} queries so far")
    if not entries:
        raise UserError("No query was found: is the text long enough for --min_count?")
    writing.write(out, "\n".join([*entries[: args.limit], ""]))
    print(f"Wrote {min(len(entries), args.limit):,} queries to {args.out}.")


def _parser() -> argparse.ArgumentParser:
    parser = commands.parser("data curate queries", __doc__)
    add = parser.add_argument
    add("--text", default="", help="files, directories or patterns, comma-separated")
    add("--text_key", default="", help="column of the text; default: caption, text or title")
    add(
        "--min_count",
        type=int,
        default=100,
        help="least count of words and pairs (default 100)",
    )
    add(
        "--min_information",
        type=float,
        default=8.0,
        help="bits of pointwise mutual information of pairs of words (default 8: they follow each "
        "other 256 times as often as by chance)",
    )
    add("--titles", default="", help="file of titles, one a line; or title, tab, views")
    add("--min_views", type=int, default=0, help="least views of titles (default 0: all)")
    add("--wordnet", default="", help="directory of WordNet's data.noun, data.verb, ...")
    add("--also", default="", help="further list, one query a line or a JSON list")
    add("--limit", type=int, default=500_000, help="queries in all (default 500000)")
    add("--out", required=True, help="file to write")
    return parser


def _sources(args: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    if args.also:
        yield "also", queries.load(locations.parse(args.also))[0].to_pylist()
    if args.wordnet:
        yield "WordNet", list(queries.wordnet(locations.parse(args.wordnet)))
    if args.text:
        yield from _phrases(args)
    if args.titles:
        yield "titles", queries.titles(locations.parse(args.titles), args.min_views)


def _phrases(args: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Yields frequent words, and pairs of them."""
    counts = phrases.count_words(lambda: _texts(args, "words"))
    total = counts.total()
    words = [word for word, count in counts.most_common() if count >= args.min_count]
    frequency = np.array([counts[word] for word in words])
    yield "words", words
    if not words:
        return
    del counts  # takes most of the memory
    found, information = [np.empty((0, 2), np.int64)], [np.empty(0)]
    for pair, count in phrases.count_pairs(lambda: _texts(args, "pairs"), words, args.min_count):
        first, second = frequency[pair].T
        bits = phrases.mutual_information(count, first, second, total)
        found.append(pair[bits >= args.min_information])
        information.append(bits[bits >= args.min_information])
    order = np.argsort(-np.concatenate(information), kind="stable")
    best = np.concatenate(found)[order].tolist()
    yield "pairs", [f"{words[first]} {words[second]}" for first, second in best]


def _texts(args: argparse.Namespace, title: str) -> Iterator[pa.Array]:
    """Yields all text, with progress by the size of the files."""
    paths, sizes = pairs.find(args.text), []
    for path, stat in zip(paths, locations.stats(paths)):
        if stat is None:
            raise UserError(f"There is no file {path} of text.")
        sizes.append(stat.size)
    counts: Counter[str] = Counter()
    with tqdm(desc=title, total=sum(sizes), unit="B", unit_scale=True) as bar:
        for path, size in zip(paths, sizes):
            for table in pairs.read(path, Columns(args.text_key, (), ()), _ARTICLES, counts):
                yield table["caption"].combine_chunks()
            bar.update(size)
    for reason, count in counts.items():
        if reason != "read":
            print(f"left out of the text: {count:,} x {reason}")
