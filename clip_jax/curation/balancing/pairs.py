"""Captions of tables and tar shards, read in batches, for files of any size."""

import logging
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from etils import epath

from clip_jax.curation.balancing.matching import pc
from clip_jax.curation.balancing.readers import READERS, Columns, Damage
from clip_jax.errors import UserError
from clip_jax.storage import locations, ranges

KINDS = tuple(READERS)
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip")
DAMAGED, MISSING = "damaged shard", "missing shard"


def find(paths: str) -> list[epath.Path]:
    """Finds the shards that a comma-separated list of files, directories and patterns names.

    Raises:
      UserError: there are none, one is of an unknown kind, or a directory holds several kinds.
    """
    found: list[epath.Path] = []
    for item in filter(None, (item.strip() for item in paths.split(","))):
        path = locations.parse(item)
        if path.is_dir():
            inside = [path / name for name in sorted(locations.listing(path))]
            shards = _of_one_kind(item, inside)
        else:
            shards = locations.expand(item, path.suffix)
        for path in shards:
            if path.suffix not in KINDS:
                squeezed = " Decompress it first." if path.suffix in _COMPRESSED else ""
                raise UserError(
                    f"{path} cannot be read: it must be one of {', '.join(KINDS)}.{squeezed}"
                )
        found += shards
    if not found:
        raise UserError(
            f"There is nothing to read at {paths!r}. It takes files, directories and patterns, "
            f'comma-separated, of {", ".join(KINDS)}; such as "DIR/*.parquet" or '
            '"gs://BUCKET/{00000..00099}.tar".'
        )
    return list(dict.fromkeys(found))


def _of_one_kind(directory: str, paths: list[epath.Path]) -> list[epath.Path]:
    kinds = sorted({path.suffix for path in paths}.intersection(KINDS))
    if len(kinds) > 1:  # such as the .parquet files that img2dataset writes beside its .tar
        raise UserError(
            f"{directory} holds {' and '.join(kinds)} files, perhaps of the same pairs. Name one "
            f"kind, such as {directory.rstrip('/')}/*{kinds[0]}."
        )
    return [path for path in paths if path.suffix in kinds]


def read(path: epath.Path, columns: Columns, rows: int, stats: Counter[str]) -> Iterator[pa.Table]:
    """Yields the usable captions of a shard.

    Args:
      path: path of the shard.
      columns: columns to read.
      rows: maximum number of rows in a batch.
      stats: counter to update with "read", the number of rows, and with the number of unusable
        rows by reason, a shard that is damaged or missing included.

    Yields:
      Tables with row (int64, position in the shard), caption (string, no nulls) and the columns to
      keep; for tar shards also key (string).

    Raises:
      UserError: a column is missing.
    """
    start = 0
    try:
        with ranges.scanning(path) as file:
            for table in READERS[path.suffix](file, path, columns, rows):
                yield _usable(table, start, stats)
                start += len(table)
    except FileNotFoundError:
        _lose(path, MISSING, "there is no such file", stats)
    except (OSError, EOFError, Damage, pa.ArrowException) as error:
        _lose(path, DAMAGED, str(error), stats)
    stats["read"] += start


def _lose(path: epath.Path, reason: str, detail: str, stats: Counter[str]) -> None:
    stats[reason] += 1
    logging.warning("%s: %s, the rows before it are used: %s", path, reason, detail)


def _usable(table: pa.Table, start: int, stats: Counter[str]) -> pa.Table:
    """Numbers the rows; drops and counts those without a caption."""
    table = table.combine_chunks()
    found = table["caption"].combine_chunks()
    captions = _decode(found)
    problems = pc.if_else(captions.is_null(), "invalid UTF-8 caption", pa.scalar(None, pa.string()))
    problems = pc.if_else(found.is_null(), "no caption", problems)
    if "problem" in table.column_names:
        problems = pc.coalesce(table["problem"].combine_chunks(), problems)
        table = table.drop_columns("problem")
    for count in problems.drop_null().value_counts().to_pylist():
        stats[count["values"]] += count["counts"]
    table = table.set_column(table.column_names.index("caption"), "caption", captions)
    rows = pa.array(np.arange(start, start + len(table)))
    return table.add_column(0, "row", rows).filter(problems.is_null())


def _decode(values: pa.Array) -> pa.Array:
    """Decodes UTF-8, given as bytes or string; null where it is invalid."""
    try:
        return values.cast(pa.binary()).cast(pa.string())
    except pa.ArrowInvalid:
        return pa.array(map(_text, values.cast(pa.binary()).to_pylist()), pa.string())


def _text(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        return None
