"""Results per shard: complete files, with a fingerprint of the inputs that they depend on."""

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
    """Writes a parquet file, complete or not at all."""
    with writing.replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def write_batches(path: epath.Path, tables: Iterator[pa.Table]) -> None:
    """Writes tables of the same columns as one parquet file; without rows, there is no file."""
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
    """Reads a file of `write_batches`, if it is there, in tables of at most `rows` rows."""
    if locations.stat(path) is None:
        return
    with ranges.scanning(path) as file:
        for batch in pq.ParquetFile(file).iter_batches(rows, use_threads=False):
            yield pa.Table.from_batches([batch])


def shard_name(path: epath.Path) -> str:
    """Returns a name for the results of a shard, unique across directories."""
    return f"{path.stem}-{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"


def fingerprint(values: Mapping[str, Any]) -> str:
    """Returns a fingerprint of values that JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class DoneMarkers:
    """The done markers of shards: files with the matches of each query, and further counts."""

    def __init__(self, directory: epath.Path):
        self._directory = directory

    def path(self, shard: epath.Path) -> epath.Path:
        return self._directory / f"{shard_name(shard)}.counts"

    def is_done(self, shard: epath.Path, wanted: str) -> bool:
        """Returns whether the shard is done, with this fingerprint."""
        try:
            with self.path(shard).open("rb") as file:
                metadata = pq.read_metadata(file).metadata or {}
        except (FileNotFoundError, pa.ArrowException):
            return False
        return metadata.get(b"fingerprint") == wanted.encode()

    def clear(self, shard: epath.Path) -> None:
        """Removes the marker of a shard; to be called before its results change."""
        writing.remove(self.path(shard))

    def write(
        self, shard: epath.Path, fingerprint: str, counts: np.ndarray, others: Mapping[str, int]
    ) -> None:
        """Marks a shard as done.

        Args:
          shard: path of the shard.
          fingerprint: fingerprint of the inputs that the results depend on.
          counts: number of matches of each query, int64 [queries].
          others: further counts, by name.
        """
        matched = np.flatnonzero(counts)
        queries = pa.array(matched, pa.int32())
        table = pa.table({"query": queries, "count": pa.array(counts[matched])})
        metadata = {"fingerprint": fingerprint, "tally": json.dumps(others)}
        write(self.path(shard), table.replace_schema_metadata(metadata))

    def read(self, shard: epath.Path) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """Reads the counts of a shard.

        Returns:
          The matched queries, int32 [n]; the number of matches of each, int64 [n]; further counts.
        """
        file = io.BytesIO(ranges.read(self.path(shard)))
        table = pq.ParquetFile(file).read(use_threads=False)
        others = json.loads(table.schema.metadata[b"tally"])
        return table["query"].to_numpy(), table["count"].to_numpy(), others


def keep_only(directory: epath.Path, shards: list[epath.Path]) -> None:
    """Removes the results of other shards, and incomplete files of killed processes."""
    if not directory.is_dir():
        return
    wanted = {shard_name(shard) for shard in shards}
    for name in locations.listing(directory):
        if name.endswith(writing.TEMPORARY) or PurePath(name).stem not in wanted:
            writing.remove(directory / name)
