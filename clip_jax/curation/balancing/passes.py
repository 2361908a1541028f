"""The work on one shard: first which queries its captions match, later which pairs to keep.

Each is done once: the mark it leaves holds a fingerprint of all that the result depends on.
"""

import dataclasses
import functools
import io
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from clip_jax.curation import store
from clip_jax.curation.balancing import matching, pairs, sampling, tars
from clip_jax.curation.balancing.matching import pc
from clip_jax.curation.balancing.readers import Columns
from clip_jax.storage import locations, ranges

_TRY_AGAIN = ""  # the fingerprint of nothing
ROWS = 65_536  # of a batch: some 100 MB of work


@dataclasses.dataclass(frozen=True)
class Job:
    """What all shards have in common.

    Attributes:
      output: directory of all results.
      columns: that are read.
      queries: fingerprint of `queries.parquet`.
    """

    output: str
    columns: Columns
    queries: str

    @property
    def root(self) -> epath.Path:
        return epath.Path(self.output)

    @property
    def matches(self) -> epath.Path:
        """Directory of the matched pairs."""
        return self.root / "matches"

    def fingerprint(self, shard: epath.Path) -> str:
        """Of what the matches of a shard depend on."""
        version = locations.stat(shard)
        columns = dataclasses.asdict(self.columns)
        return store.fingerprint(
            {"path": str(shard), "version": version, "columns": columns, "queries": self.queries}
        )


@dataclasses.dataclass(frozen=True)
class Choice:
    """How pairs are chosen.

    Attributes:
      totals: fingerprint of `counts.parquet`.
      per_query: pairs that a query keeps on average, if it has more.
      seed: of the draws.
      write_tars: whether to write the samples kept, of tar shards.
    """

    job: Job
    totals: str
    per_query: int
    seed: int
    write_tars: bool

    @property
    def selection(self) -> epath.Path:
        """Directory of the pairs kept."""
        return self.job.root / "selection"

    @property
    def tars(self) -> epath.Path:
        """Directory of the samples kept."""
        return self.job.root / "tars"

    def fingerprint(self, shard: epath.Path) -> str:
        """Of what the choice among a shard's pairs depends on."""
        own = dataclasses.asdict(self) | {"job": self.job.fingerprint(shard)}
        return store.fingerprint(own)


# ---- First pass ----------------------------------------------------------------------------------


def match(job: Job, path: str) -> int:
    """Writes the matched pairs of a shard, with their queries, and the counts of these.

    Returns:
      Pairs in the shard; 0 if this was done before.
    """
    shard, marks = epath.Path(path), store.DoneMarkers(job.matches)
    mark = job.fingerprint(shard)
    if marks.is_done(shard, mark):
        return 0
    marks.clear(shard)
    matcher = _matcher(job)
    counts = np.zeros(matcher.size, np.int64)
    tally: Counter[str] = Counter()
    tables = (
        _match(table, matcher, counts, tally)
        for table in pairs.read(shard, job.columns, ROWS, tally)
    )
    store.write_batches(job.matches / f"{store.shard_name(shard)}.parquet", tables)
    whole = not (tally[pairs.DAMAGED] or tally[pairs.MISSING])
    marks.write(shard, mark if whole else _TRY_AGAIN, counts, tally)
    return tally["read"]


def _match(
    table: pa.Table, matcher: matching.Matcher, counts: np.ndarray, tally: Counter[str]
) -> pa.Table:
    """Adds a column of queries, list of int32; leaves out and counts what matches none."""
    texts = matching.normalise(table["caption"].combine_chunks())
    queries = matcher(texts)
    counts += np.bincount(queries.values.to_numpy(), minlength=len(counts))
    matched = pc.greater(pc.list_value_length(queries), 0)
    tally["empty caption"] += pc.sum(pc.equal(texts, ""), min_count=0).as_py()
    tally["matched"] += pc.sum(matched, min_count=0).as_py()
    return table.append_column("queries", queries).filter(matched)


@functools.lru_cache(maxsize=1)
def _matcher(job: Job) -> matching.Matcher:
    """One per process."""
    table = pq.read_table(io.BytesIO(ranges.read(job.root / "queries.parquet")))
    return matching.Matcher(table["query"].combine_chunks())


# ---- Second pass ---------------------------------------------------------------------------------


def select(choice: Choice, path: str) -> int:
    """Writes the pairs of a shard that are kept, and how often each query is among them.

    Returns:
      Matched pairs; 0 if this was done before.
    """
    shard, marks = epath.Path(path), store.DoneMarkers(choice.selection)
    mark = choice.fingerprint(shard)
    if marks.is_done(shard, mark):
        return 0
    marks.clear(shard)
    keep = _probabilities(choice)
    counts = np.zeros(len(keep), np.int64)
    tally: Counter[str] = Counter()
    name = f"{store.shard_name(shard)}.parquet"
    matched = store.read_batches(choice.job.matches / name, ROWS)
    kept = _select(choice, shard, matched, keep, counts, tally)
    store.write_batches(choice.selection / name, kept)
    if choice.write_tars:
        found = store.read_batches(choice.selection / name, ROWS)
        rows = [row for table in found for row in table["row"].to_pylist()]
        tars.copy(shard, choice.tars / f"{store.shard_name(shard)}.tar", rows)
    marks.write(shard, mark, counts, {"kept": tally["kept"]})
    return tally["matched"]


def _select(
    choice: Choice,
    shard: epath.Path,
    tables: Iterator[pa.Table],
    keep: np.ndarray,
    counts: np.ndarray,
    tally: Counter[str],
) -> Iterator[pa.Table]:
    name = None
    for table in tables:
        # A data set moved elsewhere keeps its selection: the path does not matter.
        name = name or f"{shard.name}/{shard.stat().length}"
        lists = table["queries"].combine_chunks()
        queries, sizes = lists.flatten().to_numpy(), lists.value_lengths().to_numpy()
        rows = np.repeat(table["row"].to_numpy(), sizes)
        drawn = sampling.draws(choice.seed, name, rows, queries) < keep[queries]
        kept = np.logical_or.reduceat(drawn, np.cumsum(sizes) - sizes)
        counts += np.bincount(queries[np.repeat(kept, sizes)], minlength=len(counts))
        tally["matched"] += len(table)
        tally["kept"] += int(kept.sum())
        yield table.filter(pa.array(kept))


@functools.lru_cache(maxsize=1)
def _probabilities(choice: Choice) -> np.ndarray:
    """One per process."""
    with (choice.job.root / "counts.parquet").open("rb") as file:
        counts: Any = pq.read_table(file, columns=["count"])["count"].to_numpy()
    return sampling.keep_probabilities(counts, choice.per_query)
