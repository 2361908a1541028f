"""Results per shard that are either whole or not there, and know what they were made of."""

import contextlib
import hashlib
import itertools
import json
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

_TEMPORARY = ".tmp"


@contextlib.contextmanager
def replacing(path: epath.Path) -> Iterator[epath.Path]:
    """A path to write to instead; takes the name `path` if all goes well, or else disappears."""
    temporary = path.parent / f"{path.name}.{uuid.uuid4().hex[:8]}{_TEMPORARY}"
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: epath.Path, table: pa.Table) -> None:
    """Writes a parquet file at once."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        pq.write_table(table, file, compression="zstd")


def write_batches(path: epath.Path, tables: Iterator[pa.Table]) -> None:
    """Writes the rows of tables of the same columns as a parquet file; no rows, no file."""
    tables = filter(len, tables)
    first = next(tables, None)
    if first is None:
        path.unlink(missing_ok=True)
        return
    with (
        replacing(path) as temporary,
        temporary.open("wb") as file,
        pq.ParquetWriter(file, first.schema, compression="zstd") as writer,
    ):
        for table in itertools.chain([first], tables):
            writer.write_table(table)


def read_batches(path: epath.Path, rows: int) -> Iterator[pa.Table]:
    """What `write_batches` wrote, if anything, in tables of at most so many rows."""
    if not path.exists():
        return
    with path.open("rb") as file:
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
        self.path(shard).unlink(missing_ok=True)

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
        with self.path(shard).open("rb") as file:
            table = pq.ParquetFile(file).read(use_threads=False)
        tally = json.loads(table.schema.metadata[b"tally"])
        return table["query"].to_numpy(), table["count"].to_numpy(), tally


def keep_only(directory: epath.Path, shards: list[epath.Path]) -> None:
    """Removes what belongs to other shards, and what a killed process left half written."""
    wanted = {shard_name(shard) for shard in shards}
    for path in directory.glob("*"):
        if path.name.endswith(_TEMPORARY) or path.stem not in wanted:
            path.unlink()
