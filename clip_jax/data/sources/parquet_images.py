"""Images in a column of Parquet files, as on the Hugging Face hub.

The column holds encoded files (binary), or structs of `bytes` and `path`. The smallest unit that
can be read is a row group, usually 100 images. Therefore neighbouring rows are read together, and
the row groups read last are held in memory.
"""

import bisect
import functools
import itertools
import json
import logging
import re
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from clip_jax.data.sources.reading import ChunkCache
from clip_jax.errors import BadExample, UserError
from clip_jax.storage import faults, locations, ranges

# File names on the hub: the split, a number, and perhaps a checksum.
_HUB_FILE = re.compile(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?\.parquet")
_THREADS = 16  # footers read at a time
_HELD_GROUPS = 2  # row groups held in memory, for sequential reads
_LARGE = 16  # rows per row group from which random order is slow


def find(directory: epath.Path, columns: Sequence[str]) -> list[epath.Path]:
    """Finds the .parquet files that hold images, in a directory or else in its sub-directory data.

    Args:
      directory: directory to search.
      columns: columns that may hold the images.

    Returns:
      Sorted paths; none if there are no .parquet files, or the first of them holds no images.

    Raises:
      UserError: the names of the files tell several splits.
    """
    for folder in (directory, directory / "data"):
        found = locations.listing(folder) if folder.is_dir() else ()
        names = sorted(name for name in found if name.endswith(".parquet"))
        if not names:
            continue
        try:
            footers = read_footers([folder / names[0]])
        except UserError as error:  # the directory may hold images besides
            logging.warning("%s", error)
            return []
        if not any(holds_images(footers, column) for column in columns):
            return []
        splits = sorted({match[1] for name in names if (match := _HUB_FILE.fullmatch(name))})
        if len(splits) > 1:
            raise UserError(
                f"The directory {folder} has the splits {', '.join(splits)}. Name the files of "
                f"one of them, such as {folder / splits[-1]}-*.parquet."
            )
        return [folder / name for name in names]
    return []


class Footer(NamedTuple):
    """The footer of a Parquet file, which describes its contents.

    Attributes:
      path: path of the file.
      version: version of the file that was opened (see `locations.Stat`).
      metadata: pyarrow's `FileMetaData`.
      schema: schema of the columns.
    """

    path: epath.Path
    version: int | str | None
    metadata: Any
    schema: pa.Schema


def read_footers(paths: Sequence[epath.Path]) -> list[Footer]:
    """Reads the footers of files.

    Raises:
      UserError: a file does not exist, or is not a Parquet file.
    """
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(_read_footer, paths))


def _read_footer(path: epath.Path) -> Footer:
    stat = locations.stat(path)
    if stat is None:
        raise UserError(f"There is no file {path}.")
    try:
        with ranges.scanning(path) as file:
            found = pq.ParquetFile(file)
            return Footer(path, stat.version, found.metadata, found.schema_arrow)
    except (pa.ArrowException, EOFError, OSError) as error:
        raise UserError(f"The table {path} cannot be read: {error}.") from None


def holds_images(footers: Sequence[Footer], column: str) -> bool:
    """Returns whether a column holds encoded images, not only their paths."""
    return any(_has_bytes(footer, column) for footer in footers)


def _has_bytes(footer: Footer, column: str) -> bool:
    index = footer.schema.get_field_index(column)
    if index < 0:
        return False
    kind = footer.schema.field(index).type
    if pa.types.is_struct(kind):
        inner = kind.get_field_index("bytes")
        if inner < 0 or not _is_binary(kind.field(inner).type):
            return False
        return not _is_null(footer, f"{column}.bytes")
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or kind == pa.binary_view()


def _is_null(footer: Footer, leaf: str) -> bool:
    """Returns whether a column is known to hold nothing."""
    groups = [footer.metadata.row_group(i) for i in range(footer.metadata.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    return all(
        chunk.statistics is not None and chunk.statistics.null_count == chunk.num_values
        for chunk in chunks
        if chunk.path_in_schema == leaf
    )


def class_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """Returns the class names of a column of class ids, if the hub's `datasets` recorded them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        feature = features[column]
        while feature.get("_type") != "ClassLabel":
            feature = feature["feature"]
        return tuple(map(str, feature["names"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        return ()


class StoredImage(NamedTuple):
    """An image as stored in a row.

    Attributes:
      data: the encoded file; None: not in the row.
      path: path of the file, in place of `data`; None: not in the row.
    """

    data: bytes | None
    path: str | None


class StoredImages:
    """The images of a column, with random access by row over all files."""

    def __init__(
        self, footers: Sequence[Footer], column: str, *, chunk: int = 1, cached_chunks: int = 0
    ):
        """Locates the row groups; reads none.

        Args:
          footers: footers of the files.
          column: column that holds the images.
          chunk: neighbouring rows that are read together.
          cached_chunks: chunks held in memory; 0: only the row groups read last.
        """
        self._footers, self._column = footers, column
        self._groups = [
            (footer, group) for footer in footers for group in range(footer.metadata.num_row_groups)
        ]
        sizes = [footer.metadata.row_group(group).num_rows for footer, group in self._groups]
        self._first = list(itertools.accumulate(sizes, initial=0))
        self._read_groups = ChunkCache(self._start_group, _HELD_GROUPS)
        self._chunk = chunk
        self._chunks = ChunkCache(self._start_chunk, cached_chunks) if cached_chunks else None
        if not cached_chunks and sizes and max(sizes) >= _LARGE:
            logging.warning(
                "The images of %s are in row groups of up to %d rows. In shuffled order, each "
                "image costs the reading of its group; --config.data.order=windowed reads a group "
                "for several images at a time.",
                footers[0].path.parent,
                max(sizes),
            )

    def __len__(self) -> int:
        return self._first[-1]

    def start(self, rows: Sequence[int]) -> list[Callable[[], StoredImage]]:
        """Begins to read images; each function waits for one, and may raise BadExample."""
        if self._chunks is not None:
            found = [(self._chunks.start(row // self._chunk), row % self._chunk) for row in rows]
            return [functools.partial(_take, *each) for each in found]
        # A row group is read when its first image is needed, since all of them together would not
        # fit into memory.
        groups = {number: self._read_groups.start(number) for number in set(map(self._group, rows))}
        return [functools.partial(self._image, groups[self._group(row)], row) for row in rows]

    def _group(self, row: int) -> int:
        return bisect.bisect_right(self._first, row) - 1

    def _image(self, group: Callable[[], pa.Array], row: int) -> StoredImage:
        try:
            value = group()[row - self._first[self._group(row)]].as_py()
        except UnicodeDecodeError as error:  # a damaged path beside the bytes
            raise BadExample("malformed row", f"row {row}", str(error)) from None
        if isinstance(value, dict):
            return StoredImage(value.get("bytes"), value.get("path"))
        return StoredImage(value, None)

    def _start_chunk(self, number: int) -> Callable[[], list[StoredImage | BadExample]]:
        """Begins to read a chunk of neighbouring rows, by way of the row groups they are in."""
        rows = range(number * self._chunk, min((number + 1) * self._chunk, len(self)))
        groups = {each: self._read_groups.start(each) for each in map(self._group, rows)}

        def finish() -> list[StoredImage | BadExample]:
            found: list[StoredImage | BadExample] = []
            for row in rows:
                try:
                    found.append(self._image(groups[self._group(row)], row))
                except BadExample as error:
                    found.append(error)
            return found

        return finish

    def _start_group(self, number: int) -> Callable[[], pa.Array]:
        """Begins to read the column of a row group."""
        footer, group = self._groups[number]
        span = _span(footer.metadata.row_group(group), self._column)
        begun = [] if self._chunks is None else [ranges.start(footer.path, [span], footer.version)]

        def read() -> bytes:
            # A retry starts a new read.
            again = begun.pop() if begun else ranges.start(footer.path, [span], footer.version)
            return again()[0]

        def finish() -> pa.Array:
            place = f"{footer.path}, row group {group}"
            try:
                data = faults.briefly(read)
            except ranges.Replaced as error:
                raise BadExample("replaced shard", place, str(error)) from None
            except OSError as error:
                raise BadExample("missing shard", place, str(error)) from None
            try:
                file = pq.ParquetFile(_Part(span[0], data), metadata=footer.metadata)
                table = file.read_row_group(group, columns=[self._column], use_threads=False)
            except (pa.ArrowException, OSError) as error:
                raise BadExample("damaged shard", place, str(error)) from None
            return table[self._column].combine_chunks()

        return finish


def _take(chunk: Callable[[], Sequence[StoredImage | BadExample]], place: int) -> StoredImage:
    found = chunk()[place]
    if isinstance(found, BadExample):
        raise found
    return found


def _span(group: Any, column: str) -> tuple[int, int]:
    """Returns offset and size of a column in a row group; fields of a struct are contiguous."""
    first, end = [], []
    for chunk in map(group.column, range(group.num_columns)):
        if chunk.path_in_schema.partition(".")[0] == column:
            offset = chunk.data_page_offset
            if chunk.has_dictionary_page and chunk.dictionary_page_offset:
                offset = min(offset, chunk.dictionary_page_offset)
            first.append(offset)
            end.append(offset + chunk.total_compressed_size)
    return min(first), max(end) - min(first)


class _Part(ranges.Seekable):
    """A file that holds only the bytes from `first` on."""

    def __init__(self, first: int, data: bytes):
        super().__init__(first + len(data))
        self._first, self._data = first, data

    def read(self, size: int = -1) -> bytes:
        start = self._place - self._first
        if start < 0:
            raise OSError(f"byte {self._place} was not read")
        data = self._data[start : None if size < 0 else start + size]
        self._place += len(data)
        return data
