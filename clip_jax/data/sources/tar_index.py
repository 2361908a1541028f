"""The places of all files in a tar shard, from its headers alone."""

import dataclasses
import io
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, NamedTuple

import numpy as np
from etils import epath

from clip_jax.data.sources.base import IMAGE_SUFFIXES, as_key
from clip_jax.data.sources.shard_index import Kind, ScanResult
from clip_jax.storage import ranges

BLOCK = 512  # bytes; headers, and contents with their padding, are multiples of it
FILES = ("image", "txt", "json")  # the files of a sample that are read
LABELLED_FILES = (*FILES, "cls", "npy")  # the same where classes stand in files of their own
_LARGEST = ranges.MAX_WHOLE  # bytes of a file; larger ones are as good as missing
_LARGEST_EXTENSION = 2**20  # bytes of a header that extends the next one, as for a long name
_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
# Fields of a global header that would rename all members behind it.
_RENAMING = {"path", "hdrcharset", "GNU.sparse.name"}
# Raised by tarfile for hostile headers.
_UNREADABLE = (tarfile.TarError, ValueError, LookupError, OverflowError, RecursionError, EOFError)
_CHUNK = 2**20  # bytes read at a time behind the end of an archive


class Span(NamedTuple):
    """The place of the contents of a file in its shard, in bytes."""

    offset: int
    size: int


@dataclasses.dataclass
class Sample:
    """The files of one key.

    Attributes:
      headers: the headers of the image, or else of the first file; they hold the name.
      repeated: whether an earlier sample of the shard has the same key.
      files: the places of the files, by kind.
    """

    headers: Span
    repeated: bool
    files: dict[str, Span] = dataclasses.field(default_factory=dict)

    def key(self, headers: bytes) -> str:
        """Returns a key that no other sample of the shard has, from the contents of `headers`."""
        key = as_key(_name(headers).rpartition(".")[0])
        return f"{key}@{self.headers.offset}" if self.repeated else key


def _row_of(kinds: tuple[str, ...]) -> np.dtype:
    """The dtype of a row of the index.

    It holds first block and size of each kind of file (block 0: none), the number of blocks that
    the headers of the image take, and whether the key is repeated.
    """
    files = [("block", "<u4", len(kinds)), ("size", "<u4", len(kinds))]
    return np.dtype([*files, ("headers", "<u2"), ("repeated", "?")])


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


def sample_of(row: np.void) -> Sample:
    """Returns the sample that a row of the index describes."""
    files = {
        name: Span(int(block) * BLOCK, int(size))
        for name, block, size in zip(LABELLED_FILES, row["block"], row["size"])
        if block
    }
    size = int(row["headers"]) * BLOCK
    image = files.setdefault("image", Span(0, 0))  # damage of the index: an empty file
    return Sample(Span(max(image.offset - size, 0), size), bool(row["repeated"]), files)


def samples(
    file: IO[bytes], problems: Counter[str], kinds: tuple[str, ...] = FILES
) -> tuple[list[Sample], str]:
    """Groups the files of a shard by key.

    Files of one key need not be adjacent, but lie in one of the archives that a shard is joined
    from. A second file of the same key and kind begins another sample.

    Args:
      file: the shard, seekable.
      problems: counts of repeated keys and of files left out, by reason; added to. The former are
        samples like others.
      kinds: the kinds of files to look for.

    Returns:
      The samples by first appearance, complete or not; and the damage of the shard, "" where there
      is none. The samples of a damaged shard are those of its whole files.
    """
    found: list[Sample] = []
    latest: dict[str, tuple[tarfile.TarFile, Sample]] = {}
    try:
        for tar, member in members(file):
            key, _, suffix = member.name.rpartition(".")
            kind = kind_of(suffix)
            if kind not in kinds or not member.isfile() or member.size > _LARGEST:
                continue
            if problem := _problem(key, tar, member):
                problems[problem] += 1
                continue
            headers = Span(member.offset, member.offset_data - member.offset)
            archive, sample = latest.get(key, (None, None))
            if sample is None or archive is not tar or kind in sample.files:
                repeated = sample is not None
                if repeated:
                    problems["repeated key"] += 1
                sample = Sample(headers, repeated)
                latest[key] = tar, sample
                found.append(sample)
            if kind == "image":
                sample.headers = headers
            sample.files[kind] = Span(member.offset_data, member.size)
    except DamagedShard as error:
        return found, str(error)
    return found, ""


def kind_of(suffix: str) -> str:
    """Returns "image" for the suffix of an image, else the suffix itself in lower case."""
    suffix = suffix.lower()
    return "image" if suffix in IMAGE_SUFFIXES else suffix


def members(file: IO[bytes]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yields the whole members of a shard, each with its archive.

    Archives that were joined byte by byte are read one after the other.

    Raises:
      DamagedShard: at the end, if the shard ends or cannot be read before its end-of-archive mark.
    """
    size = file.seek(0, 2)
    end, start = 0, 0
    while start is not None:
        file.seek(start)
        try:
            with _open(file) as tar:
                # A size below zero would lead back.
                while (member := tar.next()) is not None and end < tar.offset <= size:
                    end = tar.offset
                    yield tar, member
                    tar.members = []  # type: ignore[attr-defined]  # would grow by 1 KB each
        except _UNREADABLE as error:
            raise DamagedShard(f"after byte {end}: {error}") from None
        start = _next_archive(file, end)
        end = start or end


def _open(file: IO[bytes]) -> tarfile.TarFile:
    return tarfile.open(
        fileobj=file, mode="r:", tarinfo=_Header, encoding="utf-8", errors="surrogateescape"
    )


def _next_archive(file: IO[bytes], end: int) -> int | None:
    """Returns the first byte of the archive behind the end-of-archive mark at `end`, if any."""
    file.seek(end)
    data = file.read(BLOCK)
    # tarfile takes a cut between two files, and a damaged header, for the end of the archive.
    if data != bytes(BLOCK):
        raise DamagedShard(f"no end-of-archive mark after byte {end}")
    while data:
        if data.count(0) < len(data):
            place = end + len(data) - len(data.lstrip(b"\0"))
            return place - place % BLOCK
        end += len(data)
        data = file.read(_CHUNK)
    return None


class _Header(tarfile.TarInfo):
    """A header with a bound on what is read for it, and names as GNU tar reads them."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in _EXTENSIONS and header.size > _LARGEST_EXTENSION):
            raise tarfile.HeaderError(f"a header with the size {header.size}")
        header.name = _short_name(buf)
        return header


def _short_name(block: bytes) -> str:
    """Returns the name in a header that nothing extends."""
    name = block[:100].split(b"\0")[0]
    # Other formats than POSIX's have times there.
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].split(b"\0")[0]):
        name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _name(headers: bytes) -> str:
    """Returns the name of a member from all its headers; "" if they are damaged."""
    if len(headers) == BLOCK:
        return _short_name(headers)
    try:
        with _open(io.BytesIO(headers)) as tar:
            member = tar.next()
    except _UNREADABLE:
        return ""
    return member.name if member else ""


def _problem(key: str, tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    """Returns the reason why a file is left out; "": none."""
    # Taken as a path, the name leads out of its directory, as in an attack.
    if key.startswith("/") or (".." in key and ".." in PurePosixPath(key).parts):
        return "unsafe file name"
    if key.rpartition("/")[2][:1] in ("", "."):  # as macOS adds to each file
        return "hidden file"
    if tar.pax_headers and _RENAMING & tar.pax_headers.keys():
        return "name in a global header"
    return "sparse file" if member.issparse() else ""


def _missing(sample: Sample, kinds: tuple[str, ...]) -> str:
    if "image" not in sample.files:
        return "no image"
    if any(kind in sample.files for kind in kinds if kind != "image"):
        return ""
    return "no caption" if kinds == FILES else "no label"


def _row(sample: Sample, kinds: tuple[str, ...]) -> tuple[list[int], list[int], int, bool]:
    places = [sample.files.get(name, Span(0, 0)) for name in kinds]
    blocks, sizes = [span.offset // BLOCK for span in places], [span.size for span in places]
    return blocks, sizes, sample.headers.size // BLOCK, sample.repeated
