"""What stands where in a tar shard, from its headers alone."""

import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

from clip_jax.data.sources import IMAGE_SUFFIXES

BLOCK = 512  # bytes; headers, and contents with their padding, are multiples of it
_LARGEST = 2**31 - 1  # bytes of a file; larger ones are as good as missing


class Span(NamedTuple):
    """Where the contents of a file stand in its shard, in bytes."""

    offset: int
    size: int


Sample = dict[str, Span]  # the files of one key that matter: "image", "txt", "json"


class DamagedShard(Exception):
    """The shard ends, or cannot be read on, before its end-of-archive mark."""


def samples(file: IO[bytes]) -> tuple[list[Sample], str]:
    """Groups the files of a shard by key.

    Files of one key need not stand together; a second file of the same key and kind begins
    another sample.

    Args:
      file: the shard, seekable.

    Returns:
      The samples by first appearance, files missing or not; and what is wrong with the shard,
      "": nothing. The samples of a damaged shard are those of its files that are whole.
    """
    found: list[Sample] = []
    latest: dict[str, Sample] = {}
    try:
        for key, kind, span in _members(file):
            if kind in latest.get(key, {kind}):
                latest[key] = {}
                found.append(latest[key])
            latest[key][kind] = span
    except DamagedShard as error:
        return found, str(error)
    return found, ""


def _members(file: IO[bytes]) -> Iterator[tuple[str, str, Span]]:
    """Key, kind and place of every file that may belong to a sample."""
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
                if usable and kind in ("image", "txt", "json"):
                    yield key, kind, Span(member.offset_data, member.size)
                tar.members = []  # type: ignore[attr-defined]  # would grow by 1 KB each
    except tarfile.TarError as error:
        raise DamagedShard(f"after byte {end}: {error}") from None
    file.seek(end)
    # tarfile takes a cut between two files, and a damaged header, for the end of the archive.
    if file.read(BLOCK) != bytes(BLOCK):
        raise DamagedShard(f"no end-of-archive mark after byte {end}")


def _round_up(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
