"""Readers of captions in tables, lines of text and tar shards.

A reader takes the open file, its path, the columns to read and the maximum number of rows in a
batch. It yields tables of

  caption   string or binary; null: there is none
  problem   string, the reason why a row cannot be used; null: none is known. May be missing

and the columns to keep, for tar shards also key (string). A row of a .csv or .tsv file with too few
or too many cells is malformed. Tables yielded before `Damage` is raised can be used.
"""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
from etils import epath

from clip_jax.data.sources import captions, table_scan
from clip_jax.data.sources.table_scan import Damage
from clip_jax.data.sources.tables import SUFFIXES, TEXT_COLUMNS
from clip_jax.data.sources.tar_index import Sample, Span, samples
from clip_jax.errors import BadExample, UserError

RESERVED = ("row", "caption", "key", "problem", "queries")  # columns with a meaning of their own
_LISTS = (pa.ListType, pa.LargeListType, pa.FixedSizeListType)


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns to read of a file.

    Attributes:
      caption: column of a table, or field of the .json files in a shard; "": the usual names.
      keep: columns or fields to pass on, unchanged from .parquet files, otherwise as text.
      names: names of all columns of .csv and .tsv files without a header; (): they have one.
    """

    caption: str
    keep: tuple[str, ...]
    names: tuple[str, ...]


Reader = Callable[[IO[bytes], epath.Path, Columns, int], Iterator[pa.Table]]


def _tables(file: IO[bytes], path: epath.Path, columns: Columns, rows: int) -> Iterator[pa.Table]:
    caption = ""

    def choose(names: Sequence[str], path: epath.Path) -> list[str]:
        nonlocal caption
        if path.suffix == ".txt":
            if columns.keep:
                raise UserError(f"{path} has one caption a line and no columns to keep.")
            (caption,) = names
            return [caption]
        # Any object of a .jsonl file may lack a field that others have.
        keep = () if path.suffix == ".jsonl" else columns.keep
        caption = _caption_column(names, dataclasses.replace(columns, keep=keep), path)
        return [caption, *columns.keep]

    as_stored = path.suffix == ".parquet"
    for block in table_scan.scan(file, path, choose, rows=rows, names=columns.names):
        if not block.columns:  # a block of a .jsonl file that has had no object so far
            yield _unusable(list(block.problems.values()))
            continue
        found = block.columns[caption]
        kept = {name: block.columns[name] for name in columns.keep}
        texts = (
            _first_text(found, path)
            if isinstance(found, pa.Array)
            else _strings(map(_first, found))
        )
        problems = pa.array(map(block.problems.get, range(block.length)), pa.string())
        yield pa.table(
            {"caption": texts, "problem": problems}
            | (kept if as_stored else {name: _strings(values) for name, values in kept.items()})
        )


def _first_text(values: pa.Array, path: epath.Path) -> pa.Array:
    """Returns a column of captions as string or binary; the first one if a cell holds several."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    while isinstance(values.type, _LISTS):
        values = pa.array(
            [cell[0] if cell else None for cell in values.to_pylist()], values.type.value_type
        )
    if pa.types.is_nested(values.type):
        raise UserError(
            f"The captions of {path} cannot be read: their column holds {values.type}, and must "
            "hold texts or lists of texts. Name another one with --text_key."
        )
    is_binary = any(values.type == each for each in (pa.binary(), pa.large_binary()))
    return values if is_binary else values.cast(pa.string())


def _unusable(reasons: Sequence[str]) -> pa.Table:
    """Returns rows that hold only the reason why they cannot be used."""
    nulls = pa.nulls(len(reasons), pa.string())
    return pa.table({"caption": nulls, "problem": pa.array(reasons, pa.string())})


def _strings(values: Iterable[Any]) -> pa.Array:
    """Converts values to text; those that are not text become JSON."""
    if isinstance(values, pa.Array):
        values = values.to_pylist()
    return pa.array(map(_string, values), pa.string())


def _tar(file: IO[bytes], path: epath.Path, columns: Columns, rows: int) -> Iterator[pa.Table]:
    problems: Counter[str] = Counter()
    found, damage = samples(file, problems)
    fields = captions.parse_fields(columns.caption)
    if (
        damage
        and found
        and not ("image" in found[-1].files and found[-1].files.keys() & {"txt", "json"})
    ):
        found.pop()  # the damage may have cut off its other file
    for batch in _batches(found, rows):
        read = [_read_sample(file, sample, fields, columns.keep) for sample in batch]
        keys, texts, records, reasons = zip(*read)
        kept = {name: _strings([each.get(name) for each in records]) for name in columns.keep}
        texts, reasons = pa.array(texts, pa.string()), pa.array(reasons, pa.string())
        yield pa.table({"caption": texts, "problem": reasons} | kept | {"key": pa.array(keys)})
    yield _unusable(["unsafe file name"] * problems["unsafe file name"])
    if damage:
        raise Damage(damage)


def _read_sample(
    file: IO[bytes], sample: Sample, fields: Sequence[captions.Field], keep: Sequence[str]
) -> tuple[str, str | None, dict[str, Any], str | None]:
    """Returns key, first caption, .json fields to keep, and why there is no caption."""
    key = sample.key(_read(file, sample.headers))
    contents = {kind: _read(file, sample.files[kind]) for kind in sample.files.keys() - {"image"}}
    record = contents.get("json")
    if "image" not in sample.files:
        return key, None, {}, "no image"
    try:
        texts = captions.read_files(contents.get("txt"), record, fields, key).texts
        kept = {name: captions.read_field(record, name, key) for name in keep}
    except BadExample as error:
        return key, None, {}, error.reason
    return key, texts[0], kept, None


def _read(file: IO[bytes], span: Span) -> bytes:
    file.seek(span.offset)
    return file.read(span.size)


def _first(text: Any) -> Any:
    if isinstance(text, list):
        return text[0] if text else None
    return text


def _string(value: Any) -> str | None:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _caption_column(names: Sequence[str], columns: Columns, path: epath.Path) -> str:
    """Returns the column of captions; raises UserError if it or one to keep is missing."""
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
    **dict.fromkeys((*SUFFIXES, ".txt"), _tables),
    ".tar": _tar,
}
