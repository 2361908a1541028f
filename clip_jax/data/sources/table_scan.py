"""Streaming reads of tables: .csv, .tsv, .jsonl, .parquet, and .txt files with one text per line.

A file of any size is read in constant memory. Every row has a number, and a malformed row is kept
with the reason. Conventions are those of pandas and pyarrow. Text is UTF-8, with or without a byte
order mark. Empty lines are not rows, except in .txt files.

.parquet    columns as stored
.jsonl      one object per line; lines end at \\n only, columns are those of the first objects
.txt        one text per line
.csv, .tsv  cells as `delimited` describes them, column names in the first row
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from etils import epath
from pyarrow import csv

from clip_jax.data.sources.delimited import LINE_END, MAX_ROW, Dialect, Row, dialect_of, read_row
from clip_jax.errors import UserError

# Reasons why a row cannot be used.
MALFORMED, INVALID, DAMAGED = "malformed row", "invalid UTF-8 caption", "damaged shard"
_TEXT = "text"  # the column of .txt files
ROWS = 2**16  # rows per block
_BLOCK = 2**23  # bytes of text read at a time
_MAX_LINE = 2**26  # bytes; a longer line is malformed
_BOM = b"\xef\xbb\xbf"
_FOREIGN = (
    (b"\x1f\x8b", "is compressed with gzip: decompress it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd: decompress it with unzstd"),
    (b"BZh", "is compressed with bzip2: decompress it with bunzip2"),
    (b"\xfd7zXZ", "is compressed with xz: decompress it with unxz"),
    (b"PK\x03\x04", "is a zip archive or a spreadsheet: save it as .csv, in UTF-8"),
    (b"\xff\xfe", "is in UTF-16: save it in UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    (b"\xfe\xff", "is in UTF-16: save it in UTF-8 (iconv -f UTF-16 -t UTF-8)"),
)

# Called with the names of all columns and the file's path; returns those that are wanted, or raises
# UserError.
Choose = Callable[[Sequence[str], epath.Path], Iterable[str]]
Values = pa.Array | list[Any]

pc: Any = pyarrow.compute  # its functions are made at import, where type checkers miss them


class Damage(Exception):
    """The rest of the file cannot be read."""


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive rows of a file.

    Attributes:
      columns: values by column name. Strings for .csv, .tsv and .txt files, or bytes if some are
        not UTF-8; Python values for .jsonl files, None where a row lacks the field; as stored for
        .parquet files.
      length: number of rows.
      problems: reason by row, for rows that are malformed. A malformed row of a .csv or .tsv file
        still has the cells that were read, and None for the others.
    """

    columns: Mapping[str, Values]
    length: int
    problems: Mapping[int, str]


def scan(
    file: IO[bytes],
    path: epath.Path,
    choose: Choose,
    *,
    rows: int = ROWS,
    names: Sequence[str] = (),
) -> Iterator[Block]:
    """Yields the rows of an open file in order.

    Args:
      file: open at its beginning; must allow `seek`.
      path: path of the file, for its suffix and for messages.
      choose: picks columns. It is not called for a .jsonl file without any object, whose blocks
        have no columns.
      rows: maximum number of rows in a block.
      names: names of all columns of a .csv or .tsv file without a header; (): it has one.

    Raises:
      Damage: the rest cannot be read; the blocks before it are good.
      UserError: raised by `choose`, or two columns have a name that was chosen.
    """
    if path.suffix == ".parquet":
        yield from _scan_parquet(file, path, choose, rows)
        return
    _skip_mark(file)
    if path.suffix == ".jsonl":
        blocks = _scan_jsonl(file, path, choose, rows)
    elif path.suffix == ".txt":
        blocks = _scan_lines(file, path, choose, rows)
    else:
        blocks = _scan_delimited(file, path, choose, rows, names)
    yield from blocks


# ---- Kinds of files ------------------------------------------------------------------------------


def _skip_mark(file: IO[bytes]) -> None:
    """Skips a byte order mark; raises Damage if the file is not UTF-8 text at all."""
    start = file.read(8)
    for magic, problem in _FOREIGN:
        if start.startswith(magic):
            raise Damage(f"it {problem}")
    file.seek(len(_BOM) if start.startswith(_BOM) else 0)


def _scan_parquet(file: IO[bytes], path: epath.Path, choose: Choose, rows: int) -> Iterator[Block]:
    try:
        source = pq.ParquetFile(file)
        wanted = _wanted(source.schema_arrow.names, choose, path)
        if not wanted:
            yield Block({}, source.metadata.num_rows, {})
            return
        for group in range(source.num_row_groups):
            yield from _scan_group(source, group, wanted, rows)
    except (pa.ArrowException, EOFError) as error:
        raise Damage(str(error)) from None


def _scan_group(
    source: pq.ParquetFile, group: int, wanted: Sequence[str], rows: int
) -> Iterator[Block]:
    """Yields the rows of a row group; those that do not decompress have nulls and a problem."""
    done, count = 0, source.metadata.row_group(group).num_rows
    try:
        batches = source.iter_batches(rows, row_groups=[group], columns=wanted, use_threads=False)
        for batch in batches:
            yield Block({name: batch[name] for name in wanted}, len(batch), {})
            done += len(batch)
    except (pa.ArrowException, OSError):
        for first in range(done, count, rows):
            length = min(rows, count - first)
            columns = {
                name: pa.nulls(length, source.schema_arrow.field(name).type) for name in wanted
            }
            yield Block(columns, length, dict.fromkeys(range(length), DAMAGED))


def _scan_lines(file: IO[bytes], path: epath.Path, choose: Choose, rows: int) -> Iterator[Block]:
    wanted = list(choose([_TEXT], path))
    for lines in _lines(file, rows):
        texts = [None if line is None else line.rstrip(b"\r") for line in lines]
        problems = {i: MALFORMED for i, text in enumerate(texts) if text is None}
        values = _texts(pa.array(texts, pa.binary()))
        yield Block(dict.fromkeys(wanted, values), len(texts), problems)


def _scan_jsonl(file: IO[bytes], path: epath.Path, choose: Choose, rows: int) -> Iterator[Block]:
    wanted: list[str] | None = None
    for lines in _lines(file, rows):
        records = [_record(line) for line in lines if line is None or line.strip()]
        problems = {i: record for i, record in enumerate(records) if isinstance(record, str)}
        objects = [{} if isinstance(record, str) else record for record in records]
        if wanted is None and len(problems) < len(records):
            wanted = _wanted(list(dict.fromkeys(itertools.chain(*objects))), choose, path)
        columns = {name: [each.get(name) for each in objects] for name in wanted or ()}
        yield Block(columns, len(records), problems)


def _record(line: bytes | None) -> dict[str, Any] | str:
    """Returns the object of a line, or the reason why there is none."""
    if line is None:
        return MALFORMED
    try:
        record = json.loads(line.decode("utf-8"))
        if b"\\ud" in line.lower():  # half of a surrogate pair has no UTF-8
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError):
        return INVALID
    except (ValueError, RecursionError):
        return MALFORMED
    return record if isinstance(record, dict) else MALFORMED


def _lines(file: IO[bytes], rows: int) -> Iterator[Sequence[bytes | None]]:
    """Yields lines, which end at \\n only; None stands for a line longer than `_MAX_LINE`."""
    rest, skipping = b"", False
    while data := file.read(_BLOCK):
        lines: list[bytes | None] = list((rest + data).split(b"\n"))
        rest = lines.pop() or b""
        if skipping and lines:
            lines[0], skipping = None, False
        if skipping or len(rest) > _MAX_LINE:
            rest, skipping = b"", True
        for first in range(0, len(lines), rows):
            yield lines[first : first + rows]
    if rest or skipping:
        yield [None if skipping else rest]


def _wanted(names: Sequence[str], choose: Choose, path: epath.Path) -> list[str]:
    """Returns the chosen columns, each once."""
    wanted = list(dict.fromkeys(choose(names, path)))
    for name in wanted:
        if names.count(name) > 1:
            raise UserError(
                f"The table {path} has {names.count(name)} columns named {name!r}, so that it "
                "cannot be told which one is meant. Rename all but one."
            )
    return wanted


# ---- Cells of .csv and .tsv files ----------------------------------------------------------------

# Most rows are unambiguous and go to pyarrow unchanged, megabytes at a time. The others are read
# cell by cell and go to pyarrow with every cell quoted.


def _scan_delimited(
    file: IO[bytes], path: epath.Path, choose: Choose, rows: int, names: Sequence[str]
) -> Iterator[Block]:
    wanted = _wanted(names, choose, path) if names else None
    buffer, at_end, skipping = b"", False, False
    while not at_end:
        data = file.read(_BLOCK)
        at_end = not data
        buffer += data
        found = _Rows(dialect_of(path.suffix, len(names) or 1))
        place = 0
        # A row that begins before `stop` is in the buffer whole, or is too long.
        stop = len(buffer) if at_end else len(buffer) - MAX_ROW
        while place < stop:
            if skipping:  # the rest of a row that is too long
                end = LINE_END.search(buffer, place)
                skipping, place = end is None, end.end() if end else len(buffer)
            elif buffer[place] in b"\r\n":
                place += 1
            elif wanted is None:
                header, place = read_row(buffer, place, found.dialect)
                if header is None:
                    raise Damage("its first row, the names of the columns, is too long")
                names = [cell.decode("utf-8", "replace") for cell in header]
                wanted = _wanted(names, choose, path)
                found = _Rows(dialect_of(path.suffix, len(names)))
            elif (match := found.dialect.regular.match(buffer, place, stop)) and match[0]:
                found.add_regular(match[0])
                place = match.end()
            else:
                row, place = read_row(buffer, place, found.dialect)
                found.add(row)
                skipping = row is None
        buffer = buffer[place:]
        if wanted is not None:
            yield from found.blocks([(name, names.index(name)) for name in wanted], rows)
    if wanted is None:
        raise Damage("the file is empty")


class _Rows:
    """Rows of one width, collected for pyarrow.

    Attributes:
      dialect: dialect of the rows.
    """

    def __init__(self, dialect: Dialect):
        self.dialect = dialect
        self._parts: list[bytes] = []
        self._length = 0
        self._widths: dict[int, int] = {}  # number of cells of each malformed row

    def add_regular(self, text: bytes) -> None:
        """Adds rows that `Dialect.regular` matches."""
        self._parts.append(text)
        self._length += len(text.splitlines()) if b"\r" in text else text.count(b"\n")

    def add(self, row: Row) -> None:
        """Adds a row of any width."""
        cells, width = row or [], self.dialect.width
        if len(cells) != width:
            self._widths[self._length] = len(cells)
            cells = [*cells, *[b""] * width][:width]
        quoted = (b'"' + cell.replace(b'"', b'""') + b'"' for cell in cells)
        self._parts.append(self.dialect.delimiter.join(quoted) + b"\n")
        self._length += 1

    def blocks(self, wanted: Sequence[tuple[str, int]], rows: int) -> Iterator[Block]:
        """Yields the rows; `wanted` holds name and position of each column."""
        columns = {name: self._column(place, values) for name, place, values in self._parse(wanted)}
        for first in range(0, self._length, rows):
            length = min(rows, self._length - first)
            problems = {i - first: MALFORMED for i in self._widths if first <= i < first + length}
            some = {
                name: _texts(values[first : first + length]) for name, values in columns.items()
            }
            yield Block(some, length, problems)

    def _parse(self, wanted: Sequence[tuple[str, int]]) -> Iterator[tuple[str, int, pa.Array]]:
        if not self._length or not wanted:
            return
        text = b"".join(self._parts)
        names = list(map(str, range(self.dialect.width)))
        table = csv.read_csv(
            pa.BufferReader(text),
            csv.ReadOptions(use_threads=False, column_names=names, block_size=len(text) + 1),
            csv.ParseOptions(delimiter=self.dialect.delimiter.decode(), newlines_in_values=True),
            # As bytes, since one cell that is not UTF-8 would fail the whole call.
            csv.ConvertOptions(
                include_columns=[str(place) for _, place in wanted],
                column_types=dict.fromkeys(names, pa.binary()),
            ),
        )
        assert len(table) == self._length
        for name, place in wanted:
            yield name, place, table[str(place)].combine_chunks()

    def _column(self, place: int, values: pa.Array) -> pa.Array:
        """Returns a column with nulls in place of cells that a row lacks."""
        if all(width > place for width in self._widths.values()):
            return values
        lacking = np.zeros(self._length, bool)
        lacking[[row for row, width in self._widths.items() if width <= place]] = True
        return pc.if_else(pa.array(lacking), pa.scalar(None, values.type), values)


def _texts(values: pa.Array) -> pa.Array:
    """Converts bytes to strings; returns them unchanged if one is not UTF-8."""
    try:
        return values.cast(pa.string())
    except pa.ArrowInvalid:
        return values
