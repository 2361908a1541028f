"""Embeddings of a data set on disk, in parts that are written atomically.

A directory holds
    embeddings.json                       the manifest
    part-00000-of-00012.parquet           the fields of Row; and, by column, embeddings
    part-00000-of-00012.image_embed.npy   the embeddings in the format npy
    skipped.jsonl                         the unusable examples, once all parts are there
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath
from jaxtyping import Float, Int64

from clip_jax.embed.reader import Row
from clip_jax.errors import BadExample, UserError
from clip_jax.storage import locations, ranges, writing

COLUMNS = ("image_embed", "image_features", "text_embed")
FORMATS = ("parquet", "npy")
DTYPES = ("float16", "float32")
BLOCK = 16_384  # rows of a block, and of a Parquet row group
_MANIFEST = "embeddings.json"
_SKIPPED = b"skipped"  # metadata of a part: JSON
_THREADS = 32  # parts read at a time, since a bucket has a long latency

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The data, the model and the format of a store.

    Attributes:
      data: values of `inputs.FIELDS`.
      examples: number of examples, usable or not.
      columns: width of each column, by name; names are those of `COLUMNS`.
      dtype: one of `DTYPES`.
      format: one of `FORMATS`.
      part_rows: examples in a part; the last part has the remainder.
      model: name of the model, for people.
      parameters: checksum of the model's parameters and tokenizer.
    """

    data: Mapping[str, str]
    examples: int
    columns: Mapping[str, int]
    dtype: str
    format: str
    part_rows: int
    model: str
    parameters: str

    @property
    def parts(self) -> int:
        """The number of parts."""
        return -(-self.examples // self.part_rows)

    @property
    def fingerprint(self) -> str:
        """A checksum of all fields, hexadecimal."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class Store:
    """A directory of embeddings. Rows are numbered through all parts, from 0."""

    def __init__(self, directory: epath.PathLike, manifest: Manifest):
        self.directory = locations.parse(directory)
        self.manifest = manifest

    # ---- Writing --------------------------------------------------------------------------------

    def begin(self) -> None:
        """Writes the manifest; every host may.

        Raises:
          UserError: the directory has another manifest.
        """
        path = self.directory / _MANIFEST
        if locations.stat(path) is not None:
            _check_same(_read_manifest(self.directory), self.manifest, self.directory)
            return
        writing.write(path, json.dumps(dataclasses.asdict(self.manifest), indent=2) + "\n")

    def path(self, part: int) -> epath.Path:
        """Returns the path of a part's table."""
        return self.directory / f"part-{part:05d}-of-{self.manifest.parts:05d}.parquet"

    def missing(self) -> list[int]:
        """Returns the parts that do not exist yet."""
        existing = locations.listing(self.directory)
        parts = range(self.manifest.parts)
        return [part for part in parts if self.path(part).name not in existing]

    def range(self, part: int) -> tuple[int, int]:
        """Returns the first example of a part, and the one behind its last."""
        first = part * self.manifest.part_rows
        return first, min(first + self.manifest.part_rows, self.manifest.examples)

    def write(
        self,
        part: int,
        rows: Sequence[Row],
        embeds: Mapping[str, Float[np.ndarray, "rows _"]],
        skipped: Mapping[int, BadExample],
    ) -> None:
        """Writes a part; its table comes last, and marks it as done.

        Args:
          part: number of the part.
          rows: rows of the usable examples.
          embeds: embeddings of these, by column, of any float dtype.
          skipped: the other examples, by index in the source.
        """
        columns = {name: [getattr(row, name) for row in rows] for name in Row._fields}
        table = pa.table(columns, schema=_SCHEMA)
        for name, values in embeds.items():
            values = values.astype(self.manifest.dtype)
            if self.manifest.format == "npy":
                path = self._array_path(part, name)
                with writing.replacing(path) as temporary, temporary.open("wb") as file:
                    np.save(file, values)
            else:
                flat = pa.array(values.reshape(-1))
                column = pa.FixedSizeListArray.from_arrays(flat, self.manifest.columns[name])
                table = table.append_column(name, column)
        bad = [
            {"index": index, "key": bad.key, "reason": bad.reason, "detail": bad.detail}
            for index, bad in sorted(skipped.items())
        ]
        table = table.replace_schema_metadata({_SKIPPED: json.dumps(bad)})
        with writing.replacing(self.path(part)) as temporary:
            pq.write_table(table, temporary, compression="zstd", row_group_size=BLOCK)

    def finish(self) -> list[dict[str, Any]]:
        """Writes and returns the list of skipped examples; all parts must exist."""
        parts = range(self.manifest.parts)
        lists = self._read_parts(
            parts, lambda _, file: json.loads(file.metadata.metadata[_SKIPPED])
        )
        skipped = [bad for each in lists for bad in each]
        lines = "".join(json.dumps(bad) + "\n" for bad in skipped)
        writing.write(self.directory / "skipped.jsonl", lines)
        return skipped

    # ---- Reading --------------------------------------------------------------------------------

    def counts(self) -> list[int]:
        """Returns the number of rows of each part."""
        return self._read_parts(range(self.manifest.parts), lambda _, file: file.metadata.num_rows)

    def blocks(self, column: str) -> Iterator[Float[np.ndarray, "_ width"]]:
        """Yields the embeddings of a column in order, at most `BLOCK` rows at a time."""
        for part in range(self.manifest.parts):
            width = self.manifest.columns[column]
            if self.manifest.format == "npy":
                path = self._array_path(part, column)
                with _reading(path):
                    values = np.load(io.BytesIO(ranges.read(path)), allow_pickle=False)
                    values = values.reshape(-1, width).astype(self.manifest.dtype, copy=False)
                for first in range(0, len(values), BLOCK):
                    yield values[first : first + BLOCK]
            else:
                path = self.path(part)
                with _reading(path), ranges.scanning(path) as file:
                    for batch in pq.ParquetFile(file).iter_batches(BLOCK, columns=[column]):
                        flat = batch.column(0).flatten().to_numpy(zero_copy_only=False)
                        yield flat.reshape(-1, width)

    def table(self) -> pa.Table:
        """Reads the fields of all rows, in order."""
        parts, columns = range(self.manifest.parts), list(Row._fields)
        return pa.concat_tables(self._read_parts(parts, lambda _, file: file.read(columns)))

    def rows(self, numbers: Sequence[int]) -> list[Row]:
        """Reads rows by their numbers, in the order given, and only their row groups."""
        parts = np.searchsorted(self._firsts, numbers, side="right") - 1
        wanted: dict[int, dict[int, int]] = {}  # numbers, by part and position in it
        for part, number in zip(parts.tolist(), numbers):
            wanted.setdefault(part, {})[number - int(self._firsts[part])] = number

        def read(part: int, file: pq.ParquetFile) -> list[tuple[int, Row]]:
            return [(wanted[part][at], row) for at, row in _read_rows(file, wanted[part])]

        found = dict(pair for pairs in self._read_parts(wanted, read) for pair in pairs)
        return [found[number] for number in numbers]

    @functools.cached_property
    def _firsts(self) -> Int64[np.ndarray, " bounds"]:
        """The number of the first row of each part, and the number of all rows."""
        return np.cumsum([0, *self.counts()])

    def _read_parts(
        self, parts: Iterable[int], read: Callable[[int, pq.ParquetFile], Result]
    ) -> list[Result]:
        """Applies `read` to the tables of some parts; it takes their number too."""

        def open_and_read(part: int) -> Result:
            with _reading(self.path(part)), self.path(part).open("rb") as file:
                return read(part, pq.ParquetFile(file))

        with futures.ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(open_and_read, parts))

    def _array_path(self, part: int, column: str) -> epath.Path:
        return self.path(part).with_suffix(f".{column}.npy")


_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("key", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("labels", pa.list_(pa.int32())),
        ("groups", pa.list_(pa.string())),
    ]
)


def open_store(directory: epath.PathLike) -> Store:
    """Opens a complete store; UserError where there is none, or parts are missing."""
    path = locations.parse(directory)
    store = Store(path, _read_manifest(path))
    if missing := store.missing():
        raise UserError(
            f"{len(missing)} of {store.manifest.parts} parts of the embeddings in {path} are "
            f"missing, the first of them {store.path(missing[0]).name}: run the same "
            "python -m clip_jax embed command again to make them."
        )
    return store


def _read_manifest(directory: epath.Path) -> Manifest:
    try:
        text = ranges.read(directory / _MANIFEST)
    except FileNotFoundError:
        raise UserError(
            f"There are no embeddings in {directory}. Make them by python -m clip_jax embed "
            f"--model=RUN DATA --out={directory}"
        ) from None
    try:
        found = Manifest(**json.loads(text))
        if found.format not in FORMATS or found.dtype not in DTYPES or found.part_rows < 1:
            raise ValueError("unknown values")
        if not all(width > 0 for width in (*found.columns.values(), found.examples + 1)):
            raise ValueError("impossible sizes")
        return found
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{directory / _MANIFEST} cannot be read ({error}): delete the directory, and make "
            "the embeddings again."
        ) from None


@contextlib.contextmanager
def _reading(path: epath.Path) -> Iterator[None]:
    """Turns what a damaged part raises into a UserError."""
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    # The header of an array may raise anything, from SyntaxError to tokenize.TokenError.
    except Exception as error:
        raise UserError(
            f"{path} cannot be read ({error}): delete it and its .parquet file, and run the same "
            "python -m clip_jax embed command again to make that part."
        ) from None


def _check_same(stored: Manifest, wanted: Manifest, directory: epath.Path) -> None:
    differing = [
        f"{field.name} {getattr(stored, field.name)!r}, not {getattr(wanted, field.name)!r}"
        for field in dataclasses.fields(Manifest)
        if getattr(stored, field.name) != getattr(wanted, field.name)
    ]
    if differing:
        raise UserError(
            f"{directory} holds embeddings made otherwise: {'; '.join(differing)}. Give the same "
            "arguments to resume them, another --out, or delete that directory."
        )


def _read_rows(file: pq.ParquetFile, wanted: Iterable[int]) -> Iterator[tuple[int, Row]]:
    """Yields the rows of one part at some positions, with these."""
    first = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        inside = [position for position in wanted if first <= position < first + count]
        if inside:
            table = file.read_row_group(group, columns=list(Row._fields))
            for position in inside:
                yield position, Row(**table.slice(position - first, 1).to_pylist()[0])
        first += count
