"""Tables in memory, for training, embedding and evaluation; `table_scan` reads them."""

import bisect
import dataclasses
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import pyarrow as pa
from etils import epath

from clip_jax.data.sources.table_scan import ROWS, Block, Choose, Damage, Values, scan
from clip_jax.errors import UserError
from clip_jax.storage import ranges

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
# Columns as they are usually called.
IMAGE_COLUMNS = ("image", "filepath", "file_name", "filename", "path", "file", "img")
TEXT_COLUMNS = ("caption", "text", "title")
_THREADS = 8  # that read files of one table


class Column(Sequence[Any]):
    """The values of a column, in pieces as they were read."""

    def __init__(self, pieces: Sequence[Values]):
        """Takes the pieces in order."""
        self._pieces = [piece for piece in pieces if len(piece)]
        self._first = list(itertools.accumulate(map(len, self._pieces), initial=0))

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, row):
        piece = bisect.bisect_right(self._first, row) - 1
        value = self._pieces[piece][row - self._first[piece]]
        return value.as_py() if isinstance(value, pa.Scalar) else value

    def __iter__(self) -> Iterator[Any]:
        for piece in self._pieces:
            for first in range(0, len(piece), ROWS):
                some = piece[first : first + ROWS]
                yield from some if isinstance(some, list) else some.to_pylist()


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns of one or more files, their rows one after the other.

    Attributes:
      columns: by name.
      problems: the reason by row, as `Block` has them.
      paths: of the files.
      first: number of the first row of each file, and of all rows.
    """

    columns: Mapping[str, Column]
    problems: Mapping[int, str]
    paths: Sequence[epath.Path]
    first: Sequence[int]

    def __len__(self) -> int:
        return self.first[-1]

    def key(self, row: int) -> str:
        """Names a row, by its file and its number there from 0."""
        file = bisect.bisect_right(self.first, row) - 1
        return f"{self.paths[file].name}:{row - self.first[file]}"


def load(paths: Sequence[epath.Path], choose: Choose) -> Table:
    """The wanted columns of tables that belong together.

    Args:
      paths: of the files.
      choose: picks columns, as for `scan`; the same of each file.

    Raises:
      UserError: a file is not there, cannot be read, is no UTF-8, or no row of it can be used; or
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
    elif path.suffix in (".csv", ".tsv"):
        _check_encoding(blocks, path)
        _warn_of_cells(blocks, path)
    return blocks


def _compact(values: Values) -> Values:
    """Texts in less memory than Python needs for them."""
    if isinstance(values, list) and all(value is None or type(value) is str for value in values):
        return pa.array(values, pa.string())
    return values


def _check_objects(blocks: Sequence[Block], path: epath.Path) -> None:
    """UserError where a .jsonl file has rows, and none of them can be read."""
    problems = [reason for block in blocks for reason in block.problems.values()]
    if problems and len(problems) == sum(block.length for block in blocks):
        raise UserError(
            f"No row of the table {path} can be read, the first for {problems[0]!r}. "
            "A .jsonl file has a JSON object in each line, in UTF-8, such as "
            '{"image": "0.jpg", "caption": "a cat"}; a list over several lines is not read.'
        )


def _check_encoding(blocks: Sequence[Block], path: epath.Path) -> None:
    """UserError where a table is in another encoding: what is not ASCII in it is not UTF-8.

    Where some of it is UTF-8, the encoding is right and rows are damaged: they are skipped later.
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
    """Logs how many rows have more or fewer cells than there are columns."""
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
    """The first of the wanted columns that a table has.

    Args:
      names: of the table's columns.
      wanted: names to look for.
      path: of the table, for the message.
      what: the column holds, and how to name another one, for the message.

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
    """The path of an image, as a column has it: text, or a struct of `bytes` and `path`."""
    if isinstance(value, dict):
        value = value.get("path")
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return None if value is None else str(value)
