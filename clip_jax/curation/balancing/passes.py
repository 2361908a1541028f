"""The two passes over a shard, which match captions to queries and then select pairs.

Each pass is done once. Its done marker holds a fingerprint of everything the result depends on.
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

_TRY_AGAIN = ""  # matches no fingerprint
ROWS = 65_536  # rows per batch, which take some 100 MB


@dataclasses.dataclass(frozen=True)
class Job:
    """The settings of the first pass, common to all shards.

    Attributes:
      output: directory of all results.
      columns: columns to read.
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
        """Computes a fingerprint of everything the matches of a shard depend on."""
        version = locations.stat(shard)
        columns = dataclasses.asdict(self.columns)
        return store.fingerprint(
            {"path": str(shard), "version": version, "columns": columns, "queries": self.queries}
        )


@dataclasses.dataclass(frozen=True)
class Choice:
    """The settings of the second pass, common to all shards.

    Attributes:
      job: settings of the first pass.
      totals: fingerprint of `counts.parquet`.
      per_query: number of pairs that a query keeps on average, if it has more.
      seed: PRNG seed of the draws.
      write_tars: whether to write the samples kept as tar shards.
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
        """Computes a fingerprint of everything the selection from a shard depends on."""
        own = dataclasses.asdict(self) | {"job": self.job.fingerprint(shard)}
        return store.fingerprint(own)


# ---- First pass ----------------------------------------------------------------------------------


def match(job: Job, path: str) -> int:
    """Writes the matched pairs of a shard with their queries, and the number of pairs per query.

    Returns:
      Number of pairs in the shard; 0 if this was done before.
    """
    shard, markers = epath.Path(path), store.DoneMarkers(job.matches)
    fingerprint = job.fingerprint(shard)
    if markers.is_done(shard, fingerprint):
        return 0
    markers.clear(shard)
    matcher = _matcher(job)
    counts = np.zeros(matcher.size, np.int64)
    stats: Counter[str] = Counter()
    tables = (
        _match(table, matcher, counts, stats)
        for table in pairs.read(shard, job.columns, ROWS, stats)
    )
    store.write_batches(job.matches / f"{store.shard_name(shard)}.parquet", tables)
    whole = not (stats[pairs.DAMAGED] or stats[pairs.MISSING])
    markers.write(shard, fingerprint if whole else _TRY_AGAIN, counts, stats)
    return stats["read"]


def _match(
    table: pa.Table, matcher: matching.Matcher, counts: np.ndarray, stats: Counter[str]
) -> pa.Table:
    """Adds a column of queries, list of int32; drops and counts pairs that match none."""
    texts = matching.normalise(table["caption"].combine_chunks())
    queries = matcher(texts)
    counts += np.bincount(queries.values.to_numpy(), minlength=len(counts))
    matched = pc.greater(pc.list_value_length(queries), 0)
    stats["empty caption"] += pc.sum(pc.equal(texts, ""), min_count=0).as_py()
    stats["matched"] += pc.sum(matched, min_count=0).as_py()
    return table.append_column("queries", queries).filter(matched)


@functools.lru_cache(maxsize=1)
def _matcher(job: Job) -> matching.Matcher:
    """Returns the matcher, built once per process."""
    table = pq.read_table(io.BytesIO(ranges.read(job.root / "queries.parquet")))
    return matching.Matcher(table["query"].combine_chunks())


# ---- Second pass ---------------------------------------------------------------------------------


def select(choice: Choice, path: str) -> int:
    """Writes the pairs of a shard that are kept, and the number of them per query.

    Returns:
      Number of matched pairs; 0 if this was done before.
    """
    shard, markers = epath.Path(path), store.DoneMarkers(choice.selection)
    fingerprint = choice.fingerprint(shard)
    if markers.is_done(shard, fingerprint):
        return 0
    markers.clear(shard)
    keep = _probabilities(choice)
    counts = np.zeros(len(keep), np.int64)
    stats: Counter[str] = Counter()
    name = f"{store.shard_name(shard)}.parquet"
    matched = store.read_batches(choice.job.matches / name, ROWS)
    kept = _select(choice, shard, matched, keep, counts, stats)
    store.write_batches(choice.selection / name, kept)
    if choice.write_tars:
        found = store.read_batches(choice.selection / name, ROWS)
        rows = [row for table in found for row in table["row"].to_pylist()]
        tars.copy(shard, choice.tars / f"{store.shard_name(shard)}.tar", rows)
    markers.write(shard, fingerprint, counts, {"kept": stats["kept"]})
    return stats["matched"]


def _select(
    choice: Choice,
    shard: epath.Path,
    tables: Iterator[pa.Table],
    keep: np.ndarray,
    counts: np.ndarray,
    stats: Counter[str],
) -> Iterator[pa.Table]:
    name = None
    for table in tables:
        # Without the path, so that a data set moved elsewhere keeps its selection.
        name = name or f"{shard.name}/{shard.stat().length}"
        lists = table["queries"].combine_chunks()
        queries, sizes = lists.flatten().to_numpy(), lists.value_lengths().to_numpy()
        rows = np.repeat(table["row"].to_numpy(), sizes)
        drawn = sampling.draws(choice.seed, name, rows, queries) < keep[queries]
        kept = np.logical_or.reduceat(drawn, np.cumsum(sizes) - sizes)
        counts += np.bincount(queries[np.repeat(kept, sizes)], minlength=len(counts))
        stats["matched"] += len(table)
        stats["kept"] += int(kept.sum())
        yield table.filter(pa.array(kept))


@functools.lru_cache(maxsize=1)
def _probabilities(choice: Choice) -> np.ndarray:
    """Returns the probability of keeping a pair per query, computed once per process."""
    with (choice.job.root / "counts.parquet").open("rb") as file:
        counts: Any = pq.read_table(file, columns=["count"])["count"].to_numpy()
    return sampling.keep_probabilities(counts, choice.per_query)
