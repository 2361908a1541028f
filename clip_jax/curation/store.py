"""Results per shard that are either whole or not there, and know what they were made of."""

import hashlib
import io
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from clip_jax.storage import locations, ranges, writing


def write(path: epath.Path, table: pa.Table) -> None:
    """Writes a parquet file at once."""
    with writing.replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def write_batches(path: epath.Path, tables: Iterator[pa.Table]) -> None:
    """Writes the rows of tables of the same columns as a parquet file; no rows, no file."""
    tables = filter(len, tables)
    first = next(tables, None)
    if first is None:
        writing.remove(path)
        return
    with (
        writing.replacing(path) as temporary,
        pq.ParquetWriter(temporary, first.schema, compression="zstd") as writer,
    ):
        for table in itertools.chain([first], tables):
            writer.write_table(table)


def read_batches(path: epath.Path, rows: int) -> Iterator[pa.Table]:
    """What `write_batches` wrote, if anything, in tables of at most so many rows."""
    if locations.stat(path) is None:
        return
    with ranges.scanning(path) as file:
        for batch in pq.ParquetFile(file).iter_batches(rows, use_threads=False):
            yield pa.Table.from_batches([batch])


def shard_name(path: epath.Path) -> str:
    """A name for what belongs to a shard: its own, told apart from those in other directories."""
    return f"{path.stem}-{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"


def fingerprint(values: Mapping[str, Any]) -> str:
    """Of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class Marks:
    """The mark that a shard is done: how often each query was met, and what else was counted."""

    def __init__(self, directory: epath.Path):
        self._directory = directory

    def path(self, shard: epath.Path) -> epath.Path:
        return self._directory / f"{shard_name(shard)}.counts"

    def is_done(self, shard: epath.Path, wanted: str) -> bool:
        """Whether the shard is done, with this fingerprint."""
        try:
            with self.path(shard).open("rb") as file:
                metadata = pq.read_metadata(file).metadata or {}
        except (FileNotFoundError, pa.ArrowException):
            return False
        return metadata.get(b"fingerprint") == wanted.encode()

    def clear(self, shard: epath.Path) -> None:
        """To be called before the results of a shard change."""
        writing.remove(self.path(shard))

    def write(
        self, shard: epath.Path, mark: str, counts: np.ndarray, tally: Mapping[str, int]
    ) -> None:
        """Marks a shard as done.

        Args:
          shard: that is done.
          mark: the fingerprint of what it was made of.
          counts: int64 [queries].
          tally: what else was counted.
        """
        met = np.flatnonzero(counts)
        table = pa.table({"query": pa.array(met, pa.int32()), "count": pa.array(counts[met])})
        metadata = {"fingerprint": mark, "tally": json.dumps(tally)}
        write(self.path(shard), table.replace_schema_metadata(metadata))

    def read(self, shard: epath.Path) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """What was counted of a shard: queries met, int32 [n], how often, int64 [n], the rest."""
        file = io.BytesIO(ranges.read(self.path(shard)))
        table = pq.ParquetFile(file).read(use_threads=False)
        tally = json.loads(table.schema.metadata[b"tally"])
        return table["query"].to_numpy(), table["count"].to_numpy(), tally


def keep_only(directory: epath.Path, shards: list[epath.Path]) -> None:
    """Removes what belongs to other shards, and what a killed process left half written."""
    if not directory.is_dir():
        return
    wanted = {shard_name(shard) for shard in shards}
    for name in locations.listing(directory):
        if name.endswith(writing.TEMPORARY) or PurePath(name).stem not in wanted:
            writing.remove(directory / name)
