"""Parts of files, read many at a time.

A request to a bucket takes 20 to 100 ms however small it is, so that examples read one after the
other come at some twenty a second. Here reads begin at once and are waited for when their results
are needed; TensorStore makes the requests concurrently, without the GIL.
"""

import contextlib
import hashlib
import io
import os
import pathlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import IO, Any

from etils import epath

from clip_jax.storage import faults, locations, remote
from clip_jax.storage.locations import Stat

# Bytes between two spans up to which one request is cheaper than two: a request takes as much CPU
# time (0.3 ms) as it takes to receive some 200 kB.
_GAP = 2**16
# Bytes of one request at most, so that merged spans still arrive in parallel.
_MAX_REQUEST = 2**23
MAX_WHOLE = 2**28  # bytes of a file that is read whole, such as one image

# Seconds without an answer until a read is cancelled and begun anew.
_STALL = 30.0

# Bytes that a scan reads at a time: at first and after a jump; and where it reads sequentially.
_MIN_CHUNK, _MAX_CHUNK = 2**16, 2**22
# Bytes that a scan reads in place of a jump, for the same reason as `_GAP`.
_JUMP = 2**18

Spans = Sequence[tuple[int, int]]


class Replaced(Exception):
    """The file is not the one that the index describes."""


def start(
    path: epath.Path, spans: Spans, version: int | str | None = None
) -> Callable[[], list[bytes]]:
    """Begins to read parts of a file; a local file is read when the result is asked for.

    Args:
      path: local or remote.
      spans: offset and size of each part, in bytes.
      version: version of the file as in `locations.Stat`, which it must still have; None: any.

    Returns:
      A function that waits for the parts, and may raise FileNotFoundError, Replaced, OSError or
      StorageError. A part that extends past the end of the file is cut short.
    """
    if not remote.is_remote(path):
        return lambda: _read_local(path, spans, version)
    groups = list(_merged(spans, _MAX_REQUEST))
    reads = [_Read(path, first, end, version) for first, end, _ in groups]

    def wait() -> list[bytes]:
        found = [b""] * len(spans)
        for (first, _, members), read in zip(groups, reads):
            data = read.wait()
            for i in members:
                offset, size = spans[i]
                found[i] = data[offset - first : offset - first + size]
        return found

    return wait


def _merged(spans: Spans, most: int) -> Iterator[tuple[int, int, list[int]]]:
    """Yields first byte, last byte and members of groups of spans that are better read at once."""
    first, end, members = 0, 0, []
    for i in sorted(range(len(spans)), key=lambda i: spans[i]):
        offset, size = spans[i]
        if members and (offset > end + _GAP or offset + size - first > most):
            yield first, end, members
            members = []
        if not members:
            first, end = offset, offset + size
        members.append(i)
        end = max(end, offset + size)
    if members:
        yield first, end, members


def start_whole(path: epath.Path) -> Callable[[], bytes]:
    """Begins to read a whole file; see `start`.

    On a disk, one of more than `MAX_WHOLE` bytes, a pipe or a device is an OSError.
    """
    if not remote.is_remote(path):
        return lambda: _read_file(path)
    return _Read(path, 0, None).wait


def _read_file(path: epath.Path) -> bytes:
    with _open_file(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > MAX_WHOLE:
            raise OSError(f"{path} has {size:,} bytes, of at most {MAX_WHOLE:,}")
        return file.read()


def _open_file(path: epath.Path) -> IO[bytes]:
    """Opens a local file; raises OSError for a pipe or a device, whose reading may never end."""
    try:
        if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
            raise OSError(f"{path} is a pipe, a socket or a device, not a file")
        return open(path, "rb")
    except ValueError as error:  # a path with a NUL
        raise OSError(f"{str(path)!r} cannot be a file: {error}") from None


def _read_local(path: epath.Path, spans: Spans, version: int | str | None) -> list[bytes]:
    found = [b""] * len(spans)
    with _open_file(path) as file:
        if version not in (None, os.fstat(file.fileno()).st_mtime_ns):
            raise Replaced(f"{path} was replaced since its index was made")
        for first, end, members in _merged(spans, _MAX_REQUEST):
            file.seek(first)
            data = file.read(end - first)
            for i in members:
                offset, size = spans[i]
                found[i] = data[offset - first : offset - first + size]
    return found


class _Read:
    """One request for the bytes [first, end) of an object, with retries.

    Args:
      path: path of the object.
      first: first byte.
      end: end of the bytes; None: that of the object.
      version: version that the object must have; None: any.
    """

    def __init__(
        self, path: epath.Path, first: int, end: int | None, version: int | str | None = None
    ):
        self._path, self._span, self._version = path, (first, end), version
        self._future = self._begin()

    def _begin(self) -> Any:
        scheme, bucket, key = remote.split(self._path)
        return remote.kvstore(scheme, bucket).read(key, byte_range=slice(*self._span))

    def wait(self) -> bytes:
        backoff = faults.Backoff(self._path)
        while True:
            try:
                found = self._future.result(timeout=_STALL)
                break
            except (ValueError, TimeoutError) as error:
                if "OUT_OF_RANGE" in str(error):
                    return self._read_to_end()
                self._future.cancel()
                backoff.wait(error)
                self._future = self._begin()
        if found.state == "missing":
            raise FileNotFoundError(f"There is no {self._path}")
        faults.record_access(self._path)
        if self._version is not None and _version(found.stamp) != self._version:
            raise Replaced(f"{self._path} was replaced since its index was made")
        return found.value

    def _read_to_end(self) -> bytes:
        """Reads the bytes up to the end of an object that ends within the span."""
        stat = locations.stat(self._path)
        first, end = self._span
        if stat is None or stat.size <= first:
            return b""
        if end is None or stat.size >= end:
            raise Replaced(f"{self._path} changes while it is read")
        return _Read(self._path, first, stat.size, self._version).wait()


def _version(stamp: Any) -> str:
    """Converts TensorStore's generation to a generation or ETag as in a listing."""
    encoded = stamp.generation
    if len(encoded) == 9 and encoded[0] == 0:  # 64 bits: Google's
        return str(int.from_bytes(encoded[1:], "little"))
    return encoded[1:].decode("ascii", "replace").strip('"')


def read(path: epath.Path) -> bytes:
    """Reads a whole file that is not large."""
    if not remote.is_remote(path):
        return path.read_bytes()
    return faults.repeat(lambda: remote.filesystem(path).cat_file(os.fspath(path)), path)


# ---- Scans of a file -----------------------------------------------------------------------------


@contextlib.contextmanager
def scanning(path: epath.Path) -> Iterator[IO[bytes]]:
    """Opens a file to read its headers, first to last; remote contents in between are skipped."""
    if not remote.is_remote(path):
        with _open_file(path) as file:
            yield file
        return
    stat = locations.stat(path)
    if stat is None:
        raise FileNotFoundError(f"There is no {path}")
    yield io.BufferedReader(_Scan(path, stat.size))  # else lines would be read byte by byte


class Seekable(io.RawIOBase):
    """The base of files of a known size that are read from any place."""

    def __init__(self, size: int):
        self._size, self._place = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place


class _Scan(Seekable):
    """A remote file that is read mostly forwards.

    Chunks grow while reads are close to sequential; then the next one is requested ahead. Large
    jumps skip the bytes in between.
    """

    def __init__(self, path: epath.Path, size: int):
        super().__init__(size)
        self._path = path
        self._first, self._data = 0, b""  # the current chunk
        self._chunk = _MIN_CHUNK
        self._next: tuple[int, int, _Read] | None = None

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._place + size, self._size)
        pieces = []
        while self._place < end:
            at = self._place - self._first
            if not 0 <= at < len(self._data):
                self._load()
                continue
            piece = self._data[at : at + end - self._place]
            pieces.append(piece)
            self._place += len(piece)
        return b"".join(pieces)

    def _load(self) -> None:
        """Loads a chunk that contains the place."""
        jump = self._place - (self._first + len(self._data))
        near = 0 <= jump <= _JUMP
        self._chunk = min(self._chunk * 2, _MAX_CHUNK) if near else _MIN_CHUNK
        if self._next is not None and self._next[0] <= self._place < self._next[1]:
            self._first, _, begun = self._next
        else:
            self._first = self._place
            begun = self._begin(self._place)[2]
        self._next = None
        self._data = begun.wait()
        if not self._data:
            raise EOFError(f"{self._path} became shorter while it was read")
        end = self._first + len(self._data)
        if self._chunk == _MAX_CHUNK and end < self._size:
            self._next = self._begin(end)

    def _begin(self, first: int) -> tuple[int, int, _Read]:
        end = min(first + self._chunk, self._size)
        return first, end, _Read(self._path, first, end)


# ---- Files that are mapped into memory -----------------------------------------------------------

_COPY_CHUNK = 2**24
_COPY_THREADS = 8


def local_copy(path: epath.Path, stat: Stat) -> pathlib.Path:
    """Returns a file that can be mapped: itself, or a copy in the user's cache, one per version."""
    if not remote.is_remote(path):
        return pathlib.Path(path)
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = cache / "clip_jax" / "copies" / hashlib.sha256(str(path).encode()).hexdigest()[:16]
    copy = folder / hashlib.sha256(str(stat).encode()).hexdigest()[:16]
    if copy.exists() and copy.stat().st_size == stat.size:
        return copy
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{uuid.uuid4().hex[:8]}"
    try:
        with partial.open("wb") as file, futures.ThreadPoolExecutor(_COPY_THREADS) as pool:
            file.truncate(stat.size)

            def fetch(first: int) -> None:
                end = min(first + _COPY_CHUNK, stat.size)
                data = _Read(path, first, end, stat.version).wait()
                os.pwrite(file.fileno(), data, first)

            list(pool.map(fetch, range(0, stat.size, _COPY_CHUNK)))
        partial.replace(copy)
    finally:
        partial.unlink(missing_ok=True)
    for old in folder.iterdir():  # a process that has mapped one can still read it
        if old != copy and not old.name.startswith("."):
            old.unlink(missing_ok=True)
    return copy
