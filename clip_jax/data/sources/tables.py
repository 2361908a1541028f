"""Tables in memory, for training, embedding and evaluation, as `table_scan` reads them."""

import bisect
import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import pyarrow as pa
from etils import epath

from clip_jax.data.sources.base import as_key
from clip_jax.data.sources.table_scan import ROWS, Block, Choose, Damage, Values, scan
from clip_jax.errors import UserError
from clip_jax.storage import locations, ranges

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
# Usual names of columns.
IMAGE_COLUMNS = ("image", "filepath", "file_name", "filename", "path", "file", "img")
TEXT_COLUMNS = ("caption", "text", "title")
_THREADS = 8  # files of one table read at a time


class Column(Sequence[Any]):
    """The values of a column, held in the pieces in which they were read."""

    def __init__(self, pieces: Sequence[Values]):
        """Concatenates pieces without copying them."""
        self._pieces = [piece for piece in pieces if len(piece)]
        self._first = list(itertools.accumulate(map(len, self._pieces), initial=0))

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, row):
        piece = bisect.bisect_right(self._first, row) - 1
        value = self._pieces[piece][row - self._first[piece]]
        try:
            return value.as_py() if isinstance(value, pa.Scalar) else value
        except UnicodeDecodeError:
            return value.as_buffer().to_pybytes()  # counted as a caption that is no UTF-8

    def __iter__(self) -> Iterator[Any]:
        for piece in self._pieces:
            for first in range(0, len(piece), ROWS):
                some = piece[first : first + ROWS]
                yield from some if isinstance(some, list) else some.to_pylist()


@dataclasses.dataclass(frozen=True)
class Table:
    """The columns of one or more files, with the rows of each file after those of the one before.

    Attributes:
      columns: values by column name.
      problems: reason by row, for malformed rows; see `Block`.
      paths: paths of the files.
      first: number of each file's first row, and the number of rows at the end.
    """

    columns: Mapping[str, Column]
    problems: Mapping[int, str]
    paths: Sequence[epath.Path]
    first: Sequence[int]

    def __len__(self) -> int:
        return self.first[-1]

    def key(self, row: int) -> str:
        """Names a row by its file and its number in the file, from 0."""
        file = bisect.bisect_right(self.first, row) - 1
        return f"{as_key(self._names[file])}:{row - self.first[file]}"

    @functools.cached_property
    def _names(self) -> list[str]:
        return locations.short_names(self.paths)


def load(paths: Sequence[epath.Path], choose: Choose) -> Table:
    """Reads the chosen columns of tables that belong together.

    Args:
      paths: paths of the files.
      choose: picks columns, the same ones of each file; see `scan`.

    Raises:
      UserError: a file does not exist, cannot be read, is not UTF-8, or has no usable row; or
        raised by `choose`.
    """
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        loaded = list(pool.map(lambda path: _load(path, choose), paths))
    names = dict.fromkeys(
        itertools.chain(*(block.columns for blocks in loaded for block in blocks))
    )
    blocks = list(itertools.chain(*loaded))
    problems, row = {}, 0
    for block in blocks:
        problems |= {row + i: reason for i, reason in block.problems.items()}
        row += block.length
    lengths = (sum(block.length for block in each) for each in loaded)
    first = list(itertools.accumulate(lengths, initial=0))
    columns = {
        name: Column([block.columns.get(name, [None] * block.length) for block in blocks])
        for name in names
    }
    return Table(columns, problems, paths, first)


def _load(path: epath.Path, choose: Choose) -> list[Block]:
    blocks: list[Block] = []
    try:
        with ranges.scanning(path) as file:
            for block in scan(file, path, choose):
                columns = {name: _compact(values) for name, values in block.columns.items()}
                blocks.append(dataclasses.replace(block, columns=columns))
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except (Damage, OSError) as error:
        raise UserError(f"The table {path} cannot be read: {error}.") from None
    if path.suffix == ".jsonl":
        _check_objects(blocks, path)
    elif path.suffix == ".parquet":
        problems = sum(len(block.problems) for block in blocks)
        if problems and problems == sum(block.length for block in blocks):
            raise UserError(f"No row of the table {path} can be read: its contents are damaged.")
    elif path.suffix in (".csv", ".tsv"):
        _check_encoding(blocks, path)
        _warn_of_cells(blocks, path)
    return blocks


def _compact(values: Values) -> Values:
    """Packs a list of strings into an Arrow array, which takes less memory."""
    if isinstance(values, list) and all(value is None or type(value) is str for value in values):
        return pa.array(values, pa.string())
    return values


def _check_objects(blocks: Sequence[Block], path: epath.Path) -> None:
    """Raises UserError if a .jsonl file has rows, but none of them can be read."""
    problems = [reason for block in blocks for reason in block.problems.values()]
    if problems and len(problems) == sum(block.length for block in blocks):
        raise UserError(
            f"No row of the table {path} can be read, the first for {problems[0]!r}. "
            "A .jsonl file has a JSON object in each line, in UTF-8, such as "
            '{"image": "0.jpg", "caption": "a cat"}; a list over several lines is not read.'
        )


def _check_encoding(blocks: Sequence[Block], path: epath.Path) -> None:
    """Raises UserError if a table is in another encoding: none of its non-ASCII text is UTF-8.

    If some of it is UTF-8, the encoding is right and single rows are damaged. Those are skipped
    later.
    """
    pieces = [values for block in blocks for values in block.columns.values()]
    if all(isinstance(each, pa.StringArray) for each in pieces):
        return
    first, row = "", 0
    for block in blocks:
        for name, values in block.columns.items():
            assert isinstance(values, pa.Array)
            for i, value in enumerate(values.cast(pa.binary()).to_pylist()):
                try:
                    if value is not None and not value.decode("utf-8").isascii():
                        return
                except UnicodeDecodeError as error:
                    first = first or f"row {row + i + 1}, column {name!r}, has {error}"
        row += block.length
    raise UserError(
        f"The table {path} is not in UTF-8: {first}. Save it in UTF-8, or convert it, as in "
        f"iconv -f LATIN1 -t UTF-8 {path.name} > new{path.suffix}."
    )


def _warn_of_cells(blocks: Sequence[Block], path: epath.Path) -> None:
    """Logs the number of rows with more or fewer cells than there are columns."""
    if count := sum(len(block.problems) for block in blocks):
        first = next(
            sum(block.length for block in blocks[:i]) + min(block.problems)
            for i, block in enumerate(blocks)
            if block.problems
        )
        logging.warning(
            "%d of the rows of %s have more or fewer cells than its first row, such as row %d; "
            "cells beyond it are ignored. Put texts with delimiters in quotes.",
            count,
            path,
            first + 1,
        )


def pick(names: Sequence[str], wanted: Sequence[str], path: epath.Path, what: str) -> str:
    """Returns the first of the wanted columns that a table has.

    Args:
      names: names of the table's columns.
      wanted: names to look for, in order of preference.
      path: path of the table, for the message.
      what: contents of the column and the setting that names another one, for the message.

    Raises:
      UserError: the table has none of them.
    """
    for name in wanted:
        if name in names:
            return name
    separated = ""
    if len(names) == 1 and path.suffix in (".csv", ".tsv"):
        separated = " A .csv has commas between columns, a .tsv tabs: is this one named rightly?"
    raise UserError(
        f"The table {path} has no column of {what}: looked for {', '.join(wanted)}; its columns "
        f"are {', '.join(map(str, names)) or 'none'}.{separated}"
    )


def path_of(value: Any) -> str | None:
    """Returns an image's path from a cell that holds text, or a struct of `bytes` and `path`."""
    if isinstance(value, dict):
        value = value.get("path")
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return None if value is None else str(value)
