"""Captions as found in each kind of file: tables, lines of text, tar shards.

A reader takes the open file, its path, the columns wanted and the most rows of a batch. It yields
tables of

  caption   string or binary, null where there is none
  problem   string, why a row cannot be used, null if nothing is known against it; may be missing

and the columns to keep; of tar shards also key (string). Rows of a .csv or .tsv file with too few
or too many fields come at its end. What was yielded before `Damage` is raised can be used.
"""

import csv
import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
from etils import epath

from clip_jax.data.sources import captions
from clip_jax.data.sources.folder import TEXT_COLUMNS
from clip_jax.data.sources.tar_index import BLOCK, Sample, samples
from clip_jax.errors import BadExample, UserError

RESERVED = ("row", "caption", "key", "problem", "queries")  # columns with a meaning of their own
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_BLOCK_BYTES = 2**23  # of .csv and .tsv files read at a time


class Damage(Exception):
    """The rest of the file cannot be read."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """What is read of a file.

    Attributes:
      caption: column of tables, or field of the .json files in a shard; "": the usual names.
      keep: columns or fields to hand on; of parquet as they are, otherwise as text.
      names: of all columns of .csv and .tsv files without a header; (): they have one.
    """

    caption: str
    keep: tuple[str, ...]
    names: tuple[str, ...]


Reader = Callable[[IO[bytes], epath.Path, Columns, int], Iterator[pa.Table]]


def _parquet(file: IO[bytes], path: epath.Path, columns: Columns, rows: int) -> Iterator[pa.Table]:
    import pyarrow.parquet as pq

    source = pq.ParquetFile(file)
    caption = _caption_column(source.schema_arrow.names, columns, path)
    wanted = list(dict.fromkeys((caption, *columns.keep)))
    for batch in source.iter_batches(rows, columns=wanted, use_threads=False):
        texts = _first_text(batch[caption])
        yield pa.table({"caption": texts} | {name: batch[name] for name in columns.keep})


def _first_text(values: pa.Array) -> pa.Array:
    """A column of captions as string or binary; of several captions in a cell the first."""
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        values = pa.array([cell[0] if cell else None for cell in values.to_pylist()])
    binary = pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)
    return values if binary else values.cast(pa.string())


def _delimited(
    file: IO[bytes], path: epath.Path, columns: Columns, rows: int
) -> Iterator[pa.Table]:
    from pyarrow import csv as arrow_csv

    malformed = []

    def skip(row: Any) -> str:
        malformed.append(row.number)
        return "skip"

    delimiter = _DELIMITERS[path.suffix]
    names = list(columns.names) or _header(file, delimiter)
    if not names:
        raise Damage("the file is empty")
    caption = _caption_column(names, columns, path)
    wanted = list(dict.fromkeys((caption, *columns.keep)))
    reader = arrow_csv.open_csv(
        file,
        arrow_csv.ReadOptions(use_threads=False, column_names=names, block_size=_BLOCK_BYTES),
        # Tab-separated files know no quotes: a lone one in a caption must not swallow lines.
        arrow_csv.ParseOptions(
            delimiter=delimiter,
            quote_char='"' if delimiter == "," else False,
            newlines_in_values=delimiter == ",",
            invalid_row_handler=skip,
        ),
        # As bytes: one caption that is not UTF-8 would fail its whole block.
        arrow_csv.ConvertOptions(
            include_columns=wanted, column_types=dict.fromkeys(wanted, pa.binary())
        ),
    )
    for batch in reader:
        kept = {
            name: pa.array(map(_decoded, batch[name].to_pylist()), pa.string())
            for name in columns.keep
        }
        table = pa.table({"caption": batch[caption]} | kept)
        yield from (table.slice(first, rows) for first in range(0, len(table), rows))
    yield _unusable("malformed row", len(malformed))


def _header(file: IO[bytes], delimiter: str) -> list[str]:
    """Reads the first line."""
    line = file.readline().decode("utf-8-sig", "replace")
    return next(csv.reader([line], delimiter=delimiter), [])


def _decoded(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def _unusable(reason: str, count: int) -> pa.Table:
    """Rows of which nothing else is known."""
    reasons = pa.array([reason] * count, pa.string())
    return pa.table({"caption": pa.nulls(count, pa.string()), "problem": reasons})


def _jsonl(file: IO[bytes], path: epath.Path, columns: Columns, rows: int) -> Iterator[pa.Table]:
    caption = ""
    for lines in _batches(filter(bytes.strip, file), rows):
        records, problems = zip(*map(_record, lines))
        if not caption and any(records):
            names = list(next(filter(None, records)))
            caption = _caption_column(names, dataclasses.replace(columns, keep=()), path)
        yield _table([record.get(caption) for record in records], records, problems, columns)


def _record(line: bytes) -> tuple[dict[str, Any], str | None]:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return {}, "invalid UTF-8 caption"
    except ValueError:
        return {}, "malformed row"
    return (record, None) if isinstance(record, dict) else ({}, "malformed row")


def _txt(file: IO[bytes], path: epath.Path, columns: Columns, rows: int) -> Iterator[pa.Table]:
    if columns.keep:
        raise UserError(f"{path} has one caption a line and no columns to keep.")
    for lines in _batches(file, rows):
        yield pa.table({"caption": pa.array([line.rstrip(b"\r\n") for line in lines])})


def _tar(file: IO[bytes], path: epath.Path, columns: Columns, rows: int) -> Iterator[pa.Table]:
    problems: Counter[str] = Counter()
    found, damage = samples(file, problems)
    fields = captions.parse_fields(columns.caption)
    if damage and found and not ("image" in found[-1] and found[-1].keys() & {"txt", "json"}):
        found.pop()  # may have lost a file: no fault of its own
    for batch in _batches(found, rows):
        read = [_read_sample(file, sample, fields, columns.keep) for sample in batch]
        keys, texts, records, reasons = zip(*read)
        yield _table(texts, records, reasons, columns).append_column("key", pa.array(keys))
    yield _unusable("unsafe file name", problems["unsafe file name"])
    if damage:
        raise Damage(damage)


def _read_sample(
    file: IO[bytes], sample: Sample, fields: Sequence[captions.Field], keep: Sequence[str]
) -> tuple[str, str | None, dict[str, Any], str | None]:
    """Key, first caption, .json fields if any are to keep, and why there is no caption."""
    key, contents = "", {}
    for kind in sample.keys() & {"txt", "json"}:
        file.seek(sample[kind].offset - BLOCK)
        name = file.read(BLOCK)[:100].split(b"\0")[0].decode("utf-8", "replace")
        key, contents[kind] = name.rpartition(".")[0], file.read(sample[kind].size)
    record = contents.get("json")
    if "image" not in sample:
        return key, None, {}, "no image"
    try:
        texts = captions.read_files(contents.get("txt"), record, fields, key).texts
        kept = {name: captions.read_field(record, name, key) for name in keep}
    except BadExample as error:
        return key, None, {}, error.reason
    return key, texts[0], kept, None


def _table(
    texts: Sequence[Any],
    records: Sequence[dict[str, Any]],
    problems: Sequence[str | None],
    columns: Columns,
) -> pa.Table:
    """What was found in JSON, as text."""
    found = {"caption": [_first(text) for text in texts], "problem": problems} | {
        name: [record.get(name) for record in records] for name in columns.keep
    }
    return pa.table(
        {name: pa.array(map(_string, values), pa.string()) for name, values in found.items()}
    )


def _first(text: Any) -> Any:
    if isinstance(text, list):
        return text[0] if text else None
    return text


def _string(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _caption_column(names: list[str], columns: Columns, path: epath.Path) -> str:
    """Name of the captions' column; UserError where it or one to keep is missing."""
    for name in columns.keep:
        if name not in names:
            raise UserError(f"{path} has no column {name!r} to keep; it has {', '.join(names)}.")
    for name in (columns.caption,) if columns.caption else TEXT_COLUMNS:
        if name in names:
            return name
    raise UserError(
        f"{path} has no column {columns.caption or ' or '.join(TEXT_COLUMNS)} of captions; it has "
        f"{', '.join(names)}. Name one with --text_key, and the columns of a file without a header "
        "with --column_names."
    )


READERS: dict[str, Reader] = {
    ".parquet": _parquet,
    ".csv": _delimited,
    ".tsv": _delimited,
    ".jsonl": _jsonl,
    ".txt": _txt,
    ".tar": _tar,
}
