"""The two passes over all shards, and their results.

matching.py    queries in captions    passes.py   the work on one shard
sampling.py    the draw of pairs      store.py    its results on disk
pairs.py, readers.py, tars.py   shards       engines.py  where the work runs
"""

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
from etils import epath

from clip_jax.curation import store
from clip_jax.curation.balancing import balance_report, passes, queries
from clip_jax.curation.balancing.engines import Engine
from clip_jax.curation.balancing.readers import Columns
from clip_jax.errors import UserError
from clip_jax.storage import writing


@dataclasses.dataclass(frozen=True)
class Plan:
    """The arguments of a selection.

    Attributes:
      shards: paths of tables or tar shards.
      columns: columns to read.
      queries: file of the queries.
      output: directory for the results.
      per_query: number of pairs that a query keeps on average, if it has more.
      seed: PRNG seed of the draws.
      write_tars: whether to write the samples kept as tar shards.
    """

    shards: list[str]
    columns: Columns
    queries: epath.Path
    output: epath.Path
    per_query: int
    seed: int
    write_tars: bool


def run(plan: Plan, engine: Engine) -> str:
    """Executes the parts of the plan that are not done yet.

    Returns:
      A summary to print.

    Raises:
      UserError: the input cannot be used.
    """
    shards = [epath.Path(shard) for shard in plan.shards]
    job, terms, dropped = _job(plan)
    choice = passes.Choice(job, "", plan.per_query, plan.seed, plan.write_tars)
    _clear_directories(choice, shards)
    engine(functools.partial(passes.match, job), plan.shards, "match")
    counts, others = _sum(store.DoneMarkers(job.matches), shards, len(terms))
    if not others["matched"]:
        raise UserError(
            f"No caption of {len(shards):,} shard(s) matches a query: {dict(others)}. Does "
            "--text_key name the captions, and are they in the language of the queries?"
        )
    choice = dataclasses.replace(choice, totals=hashlib.sha256(counts.tobytes()).hexdigest())
    _write_counts(job, terms, counts)
    engine(functools.partial(passes.select, choice), plan.shards, "select")
    kept, chosen = _sum(store.DoneMarkers(choice.selection), shards, len(terms))
    _write_counts(job, terms, counts, kept)
    report = balance_report.make(choice, terms, dropped, counts, kept, others + chosen)
    writing.write(job.root / "report.json", json.dumps(report, indent=2) + "\n")
    return balance_report.format_report(report)


def _job(plan: Plan) -> tuple[passes.Job, pa.Array, int]:
    """Stores the queries for all workers.

    Returns:
      The job; its queries; the number of entries that were left out.
    """
    terms, dropped = queries.load(plan.queries)
    store.write(plan.output / "queries.parquet", pa.table({"query": terms}))
    fingerprint = store.fingerprint({"queries": terms.to_pylist()})
    return passes.Job(str(plan.output), plan.columns, fingerprint), terms, dropped


def _clear_directories(choice: passes.Choice, shards: list[epath.Path]) -> None:
    """Removes the results of other shards from the directories of the results."""
    if choice.write_tars and any(shard.suffix != ".tar" for shard in shards):
        raise UserError("--write_tars needs tar shards as DATA, and nothing else.")
    if choice.tars.exists() and not choice.write_tars:
        raise UserError(
            f"{choice.tars} holds samples that were chosen before. Add --write_tars to choose them "
            "anew, remove that directory, or name another --out."
        )
    directories = [choice.job.matches, choice.selection]
    for directory in [*directories, choice.tars] if choice.write_tars else directories:
        store.keep_only(directory, shards)


def _sum(
    markers: store.DoneMarkers, shards: list[epath.Path], queries: int
) -> tuple[np.ndarray, Counter[str]]:
    """Sums the counts of all shards: pairs by query, int64 [queries], and further counts."""
    counts, others = np.zeros(queries, np.int64), Counter()
    with ThreadPoolExecutor(16) as pool:
        for matched, times, further in pool.map(markers.read, shards):
            counts[matched] += times
            others.update(further)
    return counts, others


def _write_counts(job: passes.Job, terms: pa.Array, *counts: np.ndarray) -> None:
    """Writes the number of matches, and if given of pairs kept, by query."""
    columns = zip(("count", "kept"), map(pa.array, counts))
    store.write(job.root / "counts.parquet", pa.table({"query": terms} | dict(columns)))
