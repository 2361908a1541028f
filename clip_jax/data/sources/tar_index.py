"""The places of all files in a tar shard, from its headers alone."""

import io
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np
from etils import epath

from clip_jax.data.sources.base import IMAGE_SUFFIXES
from clip_jax.data.sources.shard_index import Kind, ScanResult
from clip_jax.storage import ranges

BLOCK = 512  # bytes; headers, and contents with their padding, are multiples of it
FILES = ("image", "txt", "json")  # the files of a sample that are read
LABELLED_FILES = (*FILES, "cls", "npy")  # the same where classes stand in files of their own
_LARGEST = ranges.MAX_WHOLE  # bytes of a file; larger ones are as good as missing
# Names that are not UTF-8 stay distinct: each foreign byte becomes its escape.
_NAMES: Any = {"encoding": "utf-8", "errors": "backslashreplace"}
_MOST_BLOCKS = 2**16 - 1  # of the headers of a file, by the dtype of a row
_PIECE = 2**20  # bytes read at once behind the end of an archive


class Span(NamedTuple):
    """The place of the contents of a file in its shard, in bytes."""

    offset: int
    size: int


# The files of one key, by kind; and "header", all headers of the image, or else of its first
# file, which hold the whole name.
Sample = dict[str, Span]


def _row_of(kinds: tuple[str, ...]) -> np.dtype:
    """The dtype of a row of the index.

    First block and size of each kind of file, block 0 where there is none; the number of header
    blocks before the image; and the number of samples of the same key before this one.
    """
    places = [("block", "<u4", len(kinds)), ("size", "<u4", len(kinds))]
    return np.dtype([*places, ("header", "<u2"), ("repeat", "<u2")])


# Sets to train on may have billions of samples, so theirs have no room for files of classes.
ROW, LABELLED_ROW = _row_of(FILES), _row_of(LABELLED_FILES)


class DamagedShard(Exception):
    """The shard ends, or cannot be read on, before its end-of-archive mark."""


def scan(path: epath.Path) -> ScanResult:
    """Finds the usable samples of a shard, as rows; the last of a cut shard only if it is whole."""
    return _scan(path, FILES, ROW)


def scan_labelled(path: epath.Path) -> ScanResult:
    """Finds samples as `scan`, with the files of classes; one of these replaces a caption."""
    return _scan(path, LABELLED_FILES, LABELLED_ROW)


def _scan(path: epath.Path, kinds: tuple[str, ...], dtype: np.dtype) -> ScanResult:
    problems: Counter[str] = Counter()
    with ranges.scanning(path) as file:
        found, damage = samples(file, problems, kinds)
    rows = []
    for position, (sample, repeat) in enumerate(found):
        problem = _missing(sample, kinds)
        if not problem:
            rows.append(_row(sample, repeat, kinds))
        # The last sample of a cut shard may have lost a file: no fault of its own.
        elif not (damage and position == len(found) - 1):
            problems[problem] += 1
    return ScanResult(np.array(rows, dtype), dict(problems), damage)


KIND = Kind("tar", ROW, scan)
LABELLED = Kind("labelled_tar", LABELLED_ROW, scan_labelled)


def spans(row: np.void) -> Sample:
    """Returns the sample that a row of the index describes."""
    sample = {
        name: Span(int(block) * BLOCK, int(size))
        for name, block, size in zip(LABELLED_FILES, row["block"], row["size"])
        if block
    }
    length = int(row["header"]) * BLOCK
    return {**sample, "header": Span(sample["image"].offset - length, length)}


def key_of(name: str) -> str:
    """Returns what the files of a sample have in common: the name without its suffix."""
    return name.rpartition(".")[0]


def kind_of(name: str) -> str:
    """Returns the kind of a file: "image", or its suffix."""
    suffix = name.rpartition(".")[2].lower()
    return "image" if suffix in IMAGE_SUFFIXES else suffix


def name_of(header: bytes) -> str:
    """Returns the name of a file, whichever of tar's forms it has, from all of its headers."""
    with tarfile.open(fileobj=io.BytesIO(header), mode="r:", **_NAMES) as tar:
        member = tar.next()
    assert member is not None
    return member.name


def samples(
    file: IO[bytes], problems: Counter[str], kinds: tuple[str, ...] = FILES
) -> tuple[list[tuple[Sample, int]], str]:
    """Groups the files of a shard by key.

    Files of one key need not be adjacent. A second file of the same key and kind begins another
    sample.

    Args:
      file: the shard, seekable.
      problems: counts of repeated keys, of names that lead out of a directory or have control
        characters, and of sparse files; added to. The first are samples like others, the rest is
        left out.
      kinds: the kinds of files to look for.

    Returns:
      The samples by first appearance, complete or not, each with the number of those of the same
      key before it; and the damage of the shard, "" where there is none. The samples of a damaged
      shard are those of its whole files.
    """
    found: list[tuple[Sample, int]] = []
    latest: dict[str, tuple[Sample, int]] = {}
    try:
        for key, kind, span, header in _members(file, problems, kinds):
            if key not in latest or kind in latest[key][0]:
                repeat = 0
                if key in latest:
                    problems["repeated key"] += 1
                    repeat = latest[key][1] + 1
                latest[key] = {}, repeat
                found.append(latest[key])
            latest[key][0][kind] = span
            if kind == "image" or "header" not in latest[key][0]:
                latest[key][0]["header"] = header
    except DamagedShard as error:
        return found, str(error)
    return found, ""


def _missing(sample: Sample, kinds: tuple[str, ...]) -> str:
    if "image" not in sample:
        return "no image"
    if any(kind in sample for kind in kinds if kind != "image"):
        return ""
    return "no caption" if kinds == FILES else "no label"


def _row(sample: Sample, repeat: int, kinds: tuple[str, ...]) -> tuple[Any, ...]:
    places = [sample.get(name, Span(0, 0)) for name in kinds]
    blocks, sizes = [span.offset // BLOCK for span in places], [span.size for span in places]
    return blocks, sizes, sample["header"].size // BLOCK, min(repeat, 2**16 - 1)


def _members(
    file: IO[bytes], problems: Counter[str], kinds: tuple[str, ...]
) -> Iterator[tuple[str, str, Span, Span]]:
    """Yields key, kind, place and headers of every file that may belong to a sample."""
    for member in members(file):
        key = key_of(member.name)
        kind = kind_of(member.name)
        header = Span(member.offset, member.offset_data - member.offset)
        if not member.isfile() or kind not in kinds or member.size > _LARGEST:
            continue
        if member.issparse():  # its bytes are not those of the file
            problems["sparse file"] += 1
        elif _is_unsafe(member.name) or header.size // BLOCK > _MOST_BLOCKS:
            problems["unsafe file name"] += 1
        else:
            yield key, kind, Span(member.offset_data, member.size), header


def members(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Yields the members of an archive, and of further archives that were appended to it.

    Raises:
      DamagedShard: at the first member that is not whole, or that no header can be read of.
    """
    file_size = file.seek(0, 2)
    end: int | None = 0
    while end is not None:
        file.seek(end)
        try:
            with tarfile.open(fileobj=file, mode="r:", **_NAMES) as tar:
                while (member := tar.next()) is not None:
                    if "path" in tar.pax_headers:
                        raise DamagedShard(f"a global name for all files after byte {end}")
                    if member.size < 0 or tar.offset <= end:
                        raise DamagedShard(f"a file of negative size after byte {end}")
                    if tar.offset > file_size:
                        break
                    end = tar.offset
                    yield member
                    tar.members = []  # type: ignore[attr-defined]  # would grow by 1 KB each
        except (tarfile.TarError, ValueError) as error:
            raise DamagedShard(f"after byte {end}: {error}") from None
        file.seek(end)
        # tarfile takes a cut between two files, and a damaged header, for the end of the archive.
        if file.read(BLOCK) != bytes(BLOCK):
            raise DamagedShard(f"no end-of-archive mark after byte {end}")
        end = _next_content(file, end + BLOCK)


def _next_content(file: IO[bytes], place: int) -> int | None:
    """Returns the first block from `place` on that is not all zeros; None: there is none."""
    file.seek(place)
    while piece := file.read(_PIECE):
        if stripped := piece.lstrip(b"\0"):
            return place + (len(piece) - len(stripped)) // BLOCK * BLOCK
        place += len(piece)
    return None


def _is_unsafe(name: str) -> bool:
    """Returns whether a name leads out of its directory, as a path, or is no line of text."""
    if name.startswith("/") or (".." in name and ".." in PurePosixPath(name).parts):
        return True
    return not name.isprintable() and any(
        unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in name
    )
