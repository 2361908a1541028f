"""The places of all files in a tar shard, from its headers alone."""

import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, NamedTuple

import numpy as np
from etils import epath

from clip_jax.data.sources.base import IMAGE_SUFFIXES
from clip_jax.data.sources.shard_index import Kind, ScanResult
from clip_jax.storage import ranges

BLOCK = 512  # bytes; headers, and contents with their padding, are multiples of it
FILES = ("image", "txt", "json")  # the files of a sample that are read
LABELLED_FILES = (*FILES, "cls", "npy")  # the same where classes stand in files of their own
_LARGEST = 2**31 - 1  # bytes of a file; larger ones are as good as missing


class Span(NamedTuple):
    """The place of the contents of a file in its shard, in bytes."""

    offset: int
    size: int


Sample = dict[str, Span]  # the files of one key, by kind


def _row_of(kinds: tuple[str, ...]) -> np.dtype:
    """The dtype of a row of the index: first block and size of each kind of file; block 0: none."""
    return np.dtype([("block", "<u4", len(kinds)), ("size", "<u4", len(kinds))])


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
    for position, sample in enumerate(found):
        problem = _missing(sample, kinds)
        if not problem:
            rows.append(_row(sample, kinds))
        # The last sample of a cut shard may have lost a file: no fault of its own.
        elif not (damage and position == len(found) - 1):
            problems[problem] += 1
    return ScanResult(np.array(rows, dtype), dict(problems), damage)


KIND = Kind("tar", ROW, scan)
LABELLED = Kind("labelled_tar", LABELLED_ROW, scan_labelled)


def spans(row: np.void) -> Sample:
    """Returns the sample that a row of the index describes."""
    return {
        name: Span(int(block) * BLOCK, int(size))
        for name, block, size in zip(LABELLED_FILES, row["block"], row["size"])
        if block
    }


def samples(
    file: IO[bytes], problems: Counter[str], kinds: tuple[str, ...] = FILES
) -> tuple[list[Sample], str]:
    """Groups the files of a shard by key.

    Files of one key need not be adjacent. A second file of the same key and kind begins another
    sample.

    Args:
      file: the shard, seekable.
      problems: counts of repeated keys and of names that lead out of a directory; added to. The
        former are samples like others, the latter are left out.
      kinds: the kinds of files to look for.

    Returns:
      The samples by first appearance, complete or not; and the damage of the shard, "" where there
      is none. The samples of a damaged shard are those of its whole files.
    """
    found: list[Sample] = []
    latest: dict[str, Sample] = {}
    try:
        for key, kind, span in _members(file, problems, kinds):
            if kind in latest.get(key, {kind}):
                if key in latest:
                    problems["repeated key"] += 1
                latest[key] = {}
                found.append(latest[key])
            latest[key][kind] = span
    except DamagedShard as error:
        return found, str(error)
    return found, ""


def _missing(sample: Sample, kinds: tuple[str, ...]) -> str:
    if "image" not in sample:
        return "no image"
    if any(kind in sample for kind in kinds if kind != "image"):
        return ""
    return "no caption" if kinds == FILES else "no label"


def _row(sample: Sample, kinds: tuple[str, ...]) -> tuple[list[int], list[int]]:
    places = [sample.get(name, Span(0, 0)) for name in kinds]
    return [span.offset // BLOCK for span in places], [span.size for span in places]


def _members(
    file: IO[bytes], problems: Counter[str], kinds: tuple[str, ...]
) -> Iterator[tuple[str, str, Span]]:
    """Yields key, kind and place of every file that may belong to a sample."""
    file_size = file.seek(0, 2)
    file.seek(0)
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                end = _round_up(member.offset_data + member.size)
                if end > file_size:
                    break
                key, _, suffix = member.name.rpartition(".")
                kind = "image" if suffix.lower() in IMAGE_SUFFIXES else suffix.lower()
                usable = member.isfile() and member.size <= _LARGEST
                if usable and kind in kinds:
                    if _leads_out(key):
                        problems["unsafe file name"] += 1
                    else:
                        yield key, kind, Span(member.offset_data, member.size)
                tar.members = []  # type: ignore[attr-defined]  # would grow by 1 KB each
    except tarfile.TarError as error:
        raise DamagedShard(f"after byte {end}: {error}") from None
    file.seek(end)
    # tarfile takes a cut between two files, and a damaged header, for the end of the archive.
    if file.read(BLOCK) != bytes(BLOCK):
        raise DamagedShard(f"no end-of-archive mark after byte {end}")


def _leads_out(key: str) -> bool:
    """Returns whether the name, taken as a path, leads out of its directory, as in an attack."""
    return key.startswith("/") or (".." in key and ".." in PurePosixPath(key).parts)


def _round_up(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
