"""Cells of comma- and tab-separated text, as pandas and pyarrow understand them.

A row ends at \\n, \\r\\n or \\r. A cell that begins with a quote ends at the next quote that is not
doubled, and may hold delimiters and line ends. Elsewhere in a cell a quote has no special meaning.

Tables written by hand hold quotes that open a cell and never close it, as in "wow, said the cat.
Read strictly, such a quote swallows all rows up to the next quote. Therefore a quoted cell of
several lines counts only if a delimiter or the end of the row follows its closing quote, and in a
.tsv only if its lines are not all complete rows. Otherwise the opening quote, too, has no special
meaning.
"""

import dataclasses
import functools
import re

MAX_ROW = 2**22  # bytes; a longer row is malformed
LINE_END = re.compile(rb"[\r\n]")

Row = list[bytes] | None  # None: it is longer than MAX_ROW


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The syntax of a table.

    Attributes:
      delimiter: separator of cells.
      regular: pattern of any number of unambiguous rows: one per line, of the right width, with
        matching quotes.
      quoted: pattern of a cell that begins with a quote; groups: text within the quotes, text
        after them, delimiter or line end.
      plain: pattern of any other cell; groups: text, delimiter or line end.
      width: cells per row.
    """

    delimiter: bytes
    regular: re.Pattern[bytes]
    quoted: re.Pattern[bytes]
    plain: re.Pattern[bytes]
    width: int


@functools.cache
def dialect_of(suffix: str, width: int) -> Dialect:
    """Returns the dialect of a .csv or .tsv file with rows of this width."""
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
    """Returns the cells of the row at `start`, and the position after it."""
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
    """Returns whether the quoted text is one cell, rather than an opening quote never closed.

    Args:
      buffer: text that holds the row.
      start: position of the row.
      match: match of `dialect.quoted`.
      dialect: dialect of the table.
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
