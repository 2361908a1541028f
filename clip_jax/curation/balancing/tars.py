"""Copies of tar shards with only some of their samples."""

import contextlib
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import IO

from etils import epath

from clip_jax.data.sources.tar_index import samples
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
        contents = {span.offset for row in rows for span in found[row].values()}
        keys = {_key(member) for _, member in _members(file) if member.offset_data in contents}
        with tarfile.open(temporary, mode="w") as out:
            for tar, member in _members(file):
                if _key(member) in keys:
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
    end = file.seek(0, 2)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if member.isfile() and member.offset_data + member.size <= end:
                    yield tar, member
                tar.members = []  # type: ignore[attr-defined]  # would grow by 1 KB each
    except tarfile.TarError:
        return


def _key(member: tarfile.TarInfo) -> str:
    return member.name.rpartition(".")[0]
