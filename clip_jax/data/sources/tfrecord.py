"""Random access to TFRecord files, which have no index of their own."""

import bisect
import itertools
import struct
from array import array
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from clip_jax.data.sources import shard_index
from clip_jax.data.sources.shard_index import Kind, ScanResult
from clip_jax.errors import BadExample
from clip_jax.storage import faults, ranges

# A record: length (uint64), its checksum (uint32), contents, their checksum (uint32).
_HEADER = struct.Struct("<QI")
_FOOTER_BYTES = 4


def scan(path: epath.Path) -> ScanResult:
    """Finds the offsets of the whole records of a file."""
    offsets = array("Q")
    with ranges.scanning(path) as file:
        size = file.seek(0, 2)
        offset = 0
        while offset + _HEADER.size <= size:
            file.seek(offset)
            length, _ = _HEADER.unpack(file.read(_HEADER.size))
            end = offset + _HEADER.size + length + _FOOTER_BYTES
            if end > size:
                break
            offsets.append(offset)
            offset = end
    damage = "" if offset == size else f"it is cut off, or no TFRecord file, from byte {offset}"
    return ScanResult(np.frombuffer(offsets, np.uint64), {}, damage)


KIND = Kind("tfrecord", np.dtype("<u8"), scan)


class TfRecords:
    """The records of several files, or of slices of them, one after the other.

    The index takes 8 bytes per record, mapped from its file. The checksums are not verified: a
    damaged image or caption fails to decode.

    Attributes:
      stored: number of whole records in each file.
      problems: number of damaged files.
    """

    def __init__(
        self, paths: Sequence[epath.Path], slices: Sequence[slice], fallback_dir: epath.Path | None
    ):
        """Reads the index, or passes through the headers of every file.

        Args:
          paths: the files.
          slices: the records that are wanted of each file.
          fallback_dir: directory for the index where that of the files cannot be written to.
        """
        found = shard_index.load(paths, KIND, fallback_dir)
        self.problems = shard_index.count_problems(found)
        self.stored = [len(file.rows) for file in found]
        self._paths = paths
        self._files = found
        self._offsets = [file.rows[wanted] for file, wanted in zip(found, slices)]
        # Number of the first record of each file, and of all records.
        self._first = list(itertools.accumulate(map(len, self._offsets), initial=0))

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> bytes:
        """The record; raises BadExample("unreadable record") if it cannot be read after retries."""
        return self.start([index])[0]()

    def listing(self) -> list[str]:
        """Lists the files, as `Source` says."""
        return shard_index.listing(self._paths, self._files, list(map(len, self._offsets)))

    def start(self, indices: Sequence[int]) -> list[Callable[[], bytes]]:
        """Begins to read records; for each, a function that waits for it."""
        return [self._start(index) for index in indices]

    def _start(self, index: int) -> Callable[[], bytes]:
        file = bisect.bisect_right(self._first, index) - 1
        path, place = self._paths[file], index - self._first[file]
        offset, end = int(self._offsets[file][place]), self._end(file, place)

        def start() -> Callable[[], list[bytes]]:
            return ranges.start(path, [(offset, end - offset)], self._files[file].version)

        begun = [start()]  # further tries begin anew

        def finish() -> bytes:
            try:
                (data,) = faults.briefly(lambda: (begun.pop() if begun else start())())
                return _contents(data, path)
            except (OSError, ranges.Replaced) as error:
                key = f"{path.name} at byte {offset}"
                raise BadExample("unreadable record", key, str(error)) from None

        return finish

    def _end(self, file: int, place: int) -> int:
        """The end of a record, or a later byte where no wanted record follows."""
        offsets, stat = self._offsets[file], self._files[file].stat
        if place + 1 < len(offsets):
            return int(offsets[place + 1])
        return stat.size if stat is not None else int(offsets[place])


def _contents(data: bytes, path: epath.Path) -> bytes:
    """The contents of the record that some bytes begin with."""
    start = _HEADER.size
    length = _HEADER.unpack_from(data)[0] if len(data) >= start else 0
    if len(data) < start + length or not data:
        raise OSError(f"{path} ends within a record")
    return data[start : start + length]
