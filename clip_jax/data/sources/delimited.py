"""Cells of comma- and tab-separated text, as pandas and pyarrow understand them.

A row ends at \\n, \\r\\n or \\r. A cell that begins with a quote ends at the next one that is not
doubled, and may hold delimiters and line ends; a quote further inside a cell stands for itself.

Tables written by hand hold quotes that open a cell and never close it, as in "wow, said the cat.
Taken at its word, such a quote swallows all rows up to the next quote. So a quoted cell of several
lines must be written without fault: a delimiter or the end of the row follows its last quote. In a
.tsv its lines must not all be whole rows either. Otherwise the first quote stands for itself.
"""

import dataclasses
import functools
import re

MAX_ROW = 2**22  # bytes of a row
LINE_END = re.compile(rb"[\r\n]")

Row = list[bytes] | None  # None: it is longer than MAX_ROW


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How cells are written.

    Attributes:
      delimiter: between cells.
      regular: any number of rows, in a line each and of the right width, whose quotes leave no
        doubt.
      quoted: a cell that begins with a quote; groups: within the quotes, after them, its end.
      plain: any other cell; groups: the cell, its end.
      width: cells of a row.
    """

    delimiter: bytes
    regular: re.Pattern[bytes]
    quoted: re.Pattern[bytes]
    plain: re.Pattern[bytes]
    width: int


@functools.cache
def dialect_of(suffix: str, width: int) -> Dialect:
    delimiter = {".csv": b",", ".tsv": b"\t"}[suffix]
    inner = rb"[^" + delimiter + rb"\r\n]"
    cell = rb'(?:"(?:[^"\r\n]++|"")*+"|(?!")' + inner + rb"*+)"
    row = cell + rb"(?:" + delimiter + cell + rb"){%d}" % (width - 1)
    plain = rb"(" + inner + rb"*+)(" + delimiter + rb"|\r\n?|\n|\Z)"
    return Dialect(
        delimiter,
        re.compile(rb"(?:(?![\r\n])" + row + rb"(?:\r\n?|\n))*+"),
        re.compile(rb'"((?:[^"]++|"")*+)"' + plain),
        re.compile(plain),
        width,
    )


def read_row(buffer: bytes, start: int, dialect: Dialect) -> tuple[Row, int]:
    """The cells of the row at `start`, and the place behind it."""
    cells: list[bytes] = []
    place, limit = start, min(start + MAX_ROW, len(buffer))
    while True:
        match = dialect.quoted.match(buffer, place, limit)
        if match and _is_cell(buffer, start, match, dialect):
            cells.append(match[1].replace(b'""', b'"') + match[2])
        else:
            match = dialect.plain.match(buffer, place, limit)
            assert match is not None  # it matches anything
            cells.append(match[1])
        place, ending = match.end(), match[match.re.groups]
        if ending != dialect.delimiter:
            too_long = not ending and place < len(buffer)
            return None if too_long else cells, place


def _is_cell(buffer: bytes, start: int, match: re.Match[bytes], dialect: Dialect) -> bool:
    """Returns whether what stands in quotes is one cell, and the first quote no mistake.

    Args:
      buffer: text with the row.
      start: of the row that the cell is in.
      match: of `dialect.quoted`.
      dialect: the cells are written in.
    """
    if not LINE_END.search(match[1]):
        return True
    if match[2]:
        return False
    if dialect.delimiter == b"," or dialect.width < 2:
        return True
    found = LINE_END.search(buffer, match.end(1))
    lines = buffer[start : found.start() if found else len(buffer)].splitlines()
    return any(line.count(dialect.delimiter) + 1 != dialect.width for line in lines if line)
