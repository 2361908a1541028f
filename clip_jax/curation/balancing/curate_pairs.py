"""Chooses pairs so that no query has too many of them.

  python -m clip_jax data curate pairs 'laion/*.parquet' --text_key=TEXT \\
      --keep=URL --queries=queries.txt --out=curated
  python -m clip_jax data curate pairs shards/ --queries=queries.txt --out=curated \\
      --write_tars
  python -m clip_jax data curate pairs 'gs://BUCKET/*.tar' --queries=queries.txt \\
      --out=gs://BUCKET/curated --engine=beam --beam_args='--runner=DataflowRunner ...'

DATA: .parquet, .csv, .tsv, .jsonl (column caption, text or title, or --text_key), .txt (a
caption a line), .tar (KEY.txt or KEY.json beside KEY.jpg, as img2dataset writes them; the images
are not read). A file is worked on by one process, in constant memory: have some files per core.

In the directory --out:
  selection/*.parquet  the pairs kept: row in the input (and key in a tar shard), caption, the
                       columns kept, numbers of the queries matched
  tars/*.tar           with --write_tars: their samples, ready to train on
  report.json          numbers of pairs read, skipped, matched and kept; balance of the queries
  counts.parquet       every query, number of pairs that match it, number of these that are kept
  matches/*.parquet    all matched pairs

A caption matches a query if it contains the query's words in sequence, in upper or lower case, with
any punctuation between them. For each query that it matches, a pair is kept with probability
min(1, per_query / number of pairs that match the query); one success is enough. A kept pair counts
for all its queries, so that frequent ones end up with more than --per_query.

Run the same command again to resume after an interruption, and to retry what could not be read. The
result depends only on the input, the queries and the seed: not on the number of workers, nor on the
directories of the files, as long as no two of them have the same name and size.
"""

import argparse

from clip_jax.common import commands, processes
from clip_jax.common.commands import at_least
from clip_jax.curation.balancing import balance, engines, pairs
from clip_jax.curation.balancing.readers import RESERVED, Columns
from clip_jax.errors import UserError
from clip_jax.storage import locations


def main(arguments: list[str]) -> None:
    """Runs the command."""
    args = _parser().parse_args(arguments)
    plan = balance.Plan(
        shards=[str(path) for path in pairs.find(args.data)],
        columns=_columns(args),
        queries=locations.parse(args.queries),
        output=locations.reachable(args.out),
        per_query=args.per_query,
        seed=args.seed,
        write_tars=args.write_tars,
    )
    print(balance.run(plan, _engine(args)))


def _parser() -> argparse.ArgumentParser:
    parser = commands.parser("data curate pairs", __doc__)
    add = parser.add_argument
    add("data", metavar="DATA", help="files, directories or patterns, comma-separated")
    add("--queries", required=True, help="file, a query a line; or JSON as MetaCLIP's metadata")
    add("--out", required=True, help="directory for the results, made if need be")
    add("--per_query", type=at_least(1), default=20_000, help="pairs a query keeps (default 20000)")
    add("--seed", type=int, default=0, help="seed of the selection (default 0)")
    add("--text_key", default="", help="column, or field of .json files, of the captions")
    add("--keep", default="", help="further columns for the selection, such as url,width")
    add("--column_names", default="", help="all columns of .csv and .tsv without a header: a,b,c")
    add("--write_tars", action="store_true", help="write tar shards of the samples kept")
    add("--workers", type=at_least(0), default=0, help="local processes; 0: one per core")
    add("--engine", choices=("local", "beam"), default="local", help="default: local processes")
    add("--beam_args", default="", help="options of the Beam pipeline, as one argument")
    return parser


def _columns(args: argparse.Namespace) -> Columns:
    keep, names = (tuple(filter(None, t.split(","))) for t in (args.keep, args.column_names))
    if taken := set(keep) & set(RESERVED):
        raise UserError(
            f"--keep cannot name {', '.join(sorted(taken))}: the selection has it anyway."
        )
    return Columns(args.text_key, keep, names)


def _engine(args: argparse.Namespace) -> engines.Engine:
    if args.engine == "beam":
        return engines.Beam(args.beam_args)
    return engines.Local(processes.count(args.workers))
