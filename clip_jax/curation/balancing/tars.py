"""Copies of tar shards with only some of their samples."""

import contextlib
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import IO

from etils import epath

from clip_jax.data.sources.tar_index import FILES, DamagedShard, kind_of, members, samples
from clip_jax.storage import ranges, remote, writing

_CHUNK = 2**24  # bytes copied at a time


def copy(source: epath.Path, target: epath.Path, rows: Sequence[int]) -> None:
    """Copies some samples of a shard, with all files of their keys.

    Args:
      source: path of a tar shard.
      target: path of the copy, which is written atomically; removed if there are no rows.
      rows: numbers of the samples, in order of first appearance in `source`.
    """
    if not rows:
        writing.remove(target)
        return
    with _at_hand(source) as file, writing.replacing(target) as temporary:
        found, _ = samples(file, Counter())
        contents = {span.offset for row in rows for span in found[row].files.values()}
        keys = {_key(member) for _, member in _members(file) if member.offset_data in contents}
        with tarfile.open(temporary, mode="w") as out:
            for tar, member in _members(file):
                # Another sample may have the same key; which of them other files are of is not
                # known.
                if member.offset_data in contents or (
                    _key(member) in keys and _kind(member) not in FILES
                ):
                    out.addfile(member, tar.extractfile(member))
                    out.members = []  # type: ignore[misc]  # would grow by 1 KB each


@contextlib.contextmanager
def _at_hand(path: epath.Path) -> Iterator[IO[bytes]]:
    """Opens a shard for several passes; one in a bucket is copied to a temporary file first."""
    with ranges.scanning(path) as file:
        if not remote.is_remote(path):
            yield file
            return
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(file, copy, _CHUNK)
            yield copy


def _members(file: IO[bytes]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yields the complete files of a shard, up to where it is damaged."""
    try:
        for tar, member in members(file):
            if member.isfile() and not member.issparse():
                yield tar, member
    except DamagedShard:
        return


def _key(member: tarfile.TarInfo) -> str:
    return member.name.rpartition(".")[0]


def _kind(member: tarfile.TarInfo) -> str:
    return kind_of(member.name.rpartition(".")[2])
