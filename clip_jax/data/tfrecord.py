"""Random access to TFRecord files, which have no index of their own."""

import bisect
import logging
import struct
from array import array
from collections import Counter
from collections.abc import Iterable
from typing import IO, Any

import numpy as np
from etils import epath

from clip_jax.data import files
from clip_jax.errors import BadExample

# A record: length (uint64), its checksum (uint32), contents, their checksum (uint32).
_HEADER = struct.Struct("<QI")
_FOOTER_BYTES = 4


class TfRecords:
    """The records of several files, or of slices of them, one after the other.

    Takes 8 bytes per record. The checksums are not verified: a damaged image or caption fails
    to decode.
    """

    def __init__(self, instructions: Iterable[Any], problems: Counter[str]):
        """Passes through the headers of every file.

        Args:
          instructions: with `filename`, `skip`, `take` (records; -1: all) and
            `examples_in_shard`, as TFDS gives them.
          problems: where damaged files are counted.
        """
        self._paths: list[epath.Path] = []
        self._offsets: list[np.ndarray] = []
        self._first: list[int] = []  # number of the first record of each file
        self._size = 0
        for instruction in instructions:
            path = epath.Path(instruction.filename)
            offsets = _scan(path)
            if len(offsets) < instruction.examples_in_shard:
                problems["damaged file"] += 1
                logging.warning("%s has only %d whole records", path, len(offsets))
            stop = None if instruction.take == -1 else instruction.skip + instruction.take
            self._paths.append(path)
            self._offsets.append(offsets[instruction.skip : stop])
            self._first.append(self._size)
            self._size += len(self._offsets[-1])

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> bytes:
        """Raises BadExample("unreadable record") where the file cannot be read, after retries."""
        file = bisect.bisect_right(self._first, index) - 1
        path, offset = self._paths[file], int(self._offsets[file][index - self._first[file]])
        try:
            return files.with_retries(lambda: _read(path, offset), files.RETRY_DELAYS)
        except Exception as error:
            key = f"{path.name} at byte {offset}"
            raise BadExample("unreadable record", key, str(error)) from None


def _read(path: epath.Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        length, _ = _HEADER.unpack(file.read(_HEADER.size))
        record = file.read(length)
    if len(record) < length:
        raise EOFError(f"{path} ends within a record")
    return record


def _scan(path: epath.Path) -> np.ndarray:
    """Offsets of the whole records, int64; none where the file is missing."""
    offsets = array("q")
    if path.exists():
        with path.open("rb") as file:
            _scan_open(file, offsets)
    return np.frombuffer(offsets, np.int64)


def _scan_open(file: IO[bytes], offsets: array) -> None:
    size = file.seek(0, 2) or file.tell()
    offset = 0
    while offset + _HEADER.size <= size:
        file.seek(offset)
        length, _ = _HEADER.unpack(file.read(_HEADER.size))
        end = offset + _HEADER.size + length + _FOOTER_BYTES
        if end > size:
            break
        offsets.append(offset)
        offset = end
