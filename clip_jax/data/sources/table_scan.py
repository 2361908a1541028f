"""Passing through tables: .csv, .tsv, .jsonl and .parquet files, and .txt with a text a line.

A file of any size is read in constant memory. Rows are numbered and none is lost: one that is not
as it should be has a reason. Conventions are those of pandas and pyarrow. Text is UTF-8, with a
byte order mark or without. Empty lines are no rows, except in .txt files.

.parquet    as it stands
.jsonl      an object a line; lines end at \\n alone, names are those of the first objects
.txt        a text a line
.csv, .tsv  the first row has the names. A row ends at \\n, \\r\\n or \\r. A cell that begins with a
            quote ends at the next one that is not doubled, and may hold delimiters and line ends; a
            quote further inside a cell stands for itself

Tables written by hand hold quotes that open a cell and never close it, as in "wow, said the cat.
Taken at its word, such a quote swallows all rows up to the next quote. So a quoted cell of several
lines must be written without fault: a delimiter or the end of the row follows its last quote. In a
.tsv its lines must not all be whole rows either. Otherwise the first quote stands for itself.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import pyarrow as pa
from etils import epath

from clip_jax.errors import UserError

# Reasons why a row cannot be used.
MALFORMED, INVALID = "malformed row", "invalid UTF-8 caption"
_TEXT = "text"  # the column of .txt files
ROWS = 2**16  # of a block
MAX_ROW = 2**22  # bytes of a row of a .csv or .tsv file
_BLOCK = 2**23  # bytes of text that are read at a time
_MAX_LINE = 2**26  # bytes of a line
_LINE_END = re.compile(rb"[\r\n]")
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
_Row = list[bytes] | None  # None: it is longer than MAX_ROW


class Damage(Exception):
    """The rest of the file cannot be read."""


@dataclasses.dataclass(frozen=True)
class Block:
    """Some rows.

    Attributes:
      columns: by name. Of .csv, .tsv and .txt files strings, or bytes where some are not UTF-8; of
        .jsonl files Python values, None where a row has no such field; of .parquet as stored.
      length: number of rows.
      problems: the reason by row, of rows that are not as they should be. A row of a .csv or .tsv
        file has the cells there are nevertheless, None for the others.
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
      path: of the file, for its kind and for messages.
      choose: picks columns. Of a .jsonl file without any object it is not called, and there are
        no columns.
      rows: of a block, at most.
      names: of all columns of a .csv or .tsv file without a header; (): it has one.

    Raises:
      Damage: the rest cannot be read; what came before is good.
      UserError: raised by `choose`, or a wanted column is there twice.
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
    """Leaves a byte order mark behind; Damage where the file is no UTF-8 text at all."""
    start = file.read(8)
    for magic, problem in _FOREIGN:
        if start.startswith(magic):
            raise Damage(f"it {problem}")
    file.seek(len(_BOM) if start.startswith(_BOM) else 0)


def _scan_parquet(file: IO[bytes], path: epath.Path, choose: Choose, rows: int) -> Iterator[Block]:
    import pyarrow.parquet as pq

    try:
        source = pq.ParquetFile(file)
        wanted = _wanted(source.schema_arrow.names, choose, path)
        if not wanted:
            yield Block({}, source.metadata.num_rows, {})
            return
        for batch in source.iter_batches(rows, columns=wanted, use_threads=False):
            yield Block({name: batch[name] for name in wanted}, len(batch), {})
    except (pa.ArrowException, EOFError) as error:
        raise Damage(str(error)) from None


def _scan_delimited(
    file: IO[bytes], path: epath.Path, choose: Choose, rows: int, names: Sequence[str]
) -> Iterator[Block]:
    wanted: list[str] | None = None
    for found in _read_rows(file, path.suffix):
        if wanted is None:
            if not names:
                header = found.pop(0)
                if header is None:
                    raise Damage("its first row, the names of the columns, is too long")
                names = [cell.decode("utf-8", "replace") for cell in header]
            wanted = _wanted(names, choose, path)
        for first in range(0, len(found), rows):
            yield _block_of_cells(found[first : first + rows], names, wanted)
    if wanted is None and not names:
        raise Damage("the file is empty")


def _block_of_cells(rows: Sequence[_Row], names: Sequence[str], wanted: Sequence[str]) -> Block:
    problems = {i: MALFORMED for i, row in enumerate(rows) if row is None or len(row) != len(names)}
    if problems:
        blank = [None] * len(names)
        rows = [[*(row or ()), *blank][: len(names)] for row in rows]
    places = {name: names.index(name) for name in wanted}
    columns = {name: _texts([row[place] for row in rows]) for name, place in places.items()}
    return Block(columns, len(rows), problems)


def _texts(values: Sequence[bytes | None]) -> pa.Array:
    """Strings, or bytes where one is not UTF-8."""
    found = pa.array(values, pa.binary())
    try:
        return found.cast(pa.string())
    except pa.ArrowInvalid:
        return found


def _scan_lines(file: IO[bytes], path: epath.Path, choose: Choose, rows: int) -> Iterator[Block]:
    wanted = list(choose([_TEXT], path))
    for lines in _lines(file, rows):
        texts = [None if line is None else line.rstrip(b"\r") for line in lines]
        problems = {i: MALFORMED for i, text in enumerate(texts) if text is None}
        yield Block(dict.fromkeys(wanted, _texts(texts)), len(texts), problems)


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
    """An object, or why there is none."""
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
    """Yields lines, which end at \\n alone; None: one that is longer than a line may be."""
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
    """The chosen columns, each once."""
    wanted = list(dict.fromkeys(choose(names, path)))
    for name in wanted:
        if names.count(name) > 1:
            raise UserError(
                f"The table {path} has {names.count(name)} columns named {name!r}, so that it "
                "cannot be told which one is meant. Rename all but one."
            )
    return wanted


# ---- Cells of .csv and .tsv files ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Dialect:
    """How cells are written.

    Attributes:
      delimiter: between cells.
      quoted: a cell that begins with a quote; groups: within the quotes, after them, its end.
      plain: any other cell; groups: the cell, its end.
    """

    delimiter: bytes
    quoted: re.Pattern[bytes]
    plain: re.Pattern[bytes]


def _dialect(delimiter: bytes) -> _Dialect:
    plain = rb"([^" + delimiter + rb"\r\n]*+)(" + delimiter + rb"|\r\n?|\n|\Z)"
    return _Dialect(delimiter, re.compile(rb'"((?:[^"]++|"")*+)"' + plain), re.compile(plain))


_DIALECTS = {".csv": _dialect(b","), ".tsv": _dialect(b"\t")}


def _read_rows(file: IO[bytes], suffix: str) -> Iterator[list[_Row]]:
    """Yields the rows of a file, its header among them, some megabytes at a time.

    Empty lines are no rows.

    Args:
      file: open at the first row.
      suffix: ".csv" or ".tsv".
    """
    dialect, width = _DIALECTS[suffix], 0
    buffer, at_end, skipping = b"", False, False
    while not at_end:
        data = file.read(_BLOCK)
        at_end = not data
        buffer += data
        rows: list[_Row] = []
        place = 0
        # A row that begins before `stop` is known whole, or known to be too long.
        stop = len(buffer) if at_end else len(buffer) - MAX_ROW
        while place < stop:
            if skipping:  # the rest of a row that is too long
                found = _LINE_END.search(buffer, place)
                skipping, place = found is None, found.end() if found else len(buffer)
            elif (end := _end_of_plain_rows(buffer, place, stop)) > place:
                lines = buffer[place:end].splitlines()
                rows += [line.split(dialect.delimiter) for line in lines if line]
                place = end
            elif buffer[place] in b"\r\n":
                place += 1
            else:
                row, place = _read_row(buffer, place, dialect, width)
                rows.append(row)
                skipping = row is None
            width = width or next((len(row) for row in rows if row), 0)
        buffer = buffer[place:]
        if rows:
            yield rows


def _end_of_plain_rows(buffer: bytes, start: int, stop: int) -> int:
    """Place behind the last row from `start` on before the next quote: the fast way."""
    quote = buffer.find(b'"', start, stop)
    end = stop if quote < 0 else quote
    return max(buffer.rfind(b"\n", start, end), buffer.rfind(b"\r", start, end)) + 1


def _read_row(buffer: bytes, start: int, dialect: _Dialect, width: int) -> tuple[_Row, int]:
    """The cells of the row at `start`, and the place behind it."""
    cells: list[bytes] = []
    place, limit = start, min(start + MAX_ROW, len(buffer))
    while True:
        match = dialect.quoted.match(buffer, place, limit)
        if match and _is_cell(buffer, start, match, dialect, width):
            cells.append(match[1].replace(b'""', b'"') + match[2])
        else:
            match = dialect.plain.match(buffer, place, limit)
            assert match is not None  # it matches anything
            cells.append(match[1])
        place, ending = match.end(), match[match.re.groups]
        if ending != dialect.delimiter:
            too_long = not ending and place < len(buffer)
            return None if too_long else cells, place


def _is_cell(
    buffer: bytes, start: int, match: re.Match[bytes], dialect: _Dialect, width: int
) -> bool:
    """Returns whether what stands in quotes is one cell, and the first quote no mistake.

    Args:
      start: of the row that the cell is in.
      match: of `dialect.quoted`.
      width: cells of the first row; 0: this is it.
    """
    if not _LINE_END.search(match[1]):
        return True
    if match[2]:
        return False
    if dialect.delimiter == b"," or width < 2:
        return True
    found = _LINE_END.search(buffer, match.end(1))
    lines = buffer[start : found.start() if found else len(buffer)].splitlines()
    return any(line.count(dialect.delimiter) + 1 != width for line in lines if line)
