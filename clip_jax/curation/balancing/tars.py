"""Copies of tar shards with only some of their samples."""

import contextlib
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import IO

from etils import epath

from clip_jax.data.sources import tar_index
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
        found, _ = tar_index.samples(file, Counter())
        contents = {span.offset for row in rows for span in found[row][0].values()}
        keys = {_key(member) for member in _whole(file) if member.offset_data in contents}
        with tarfile.open(temporary, mode="w") as out:
            for member in _whole(file):
                if not _belongs(member, contents, keys):
                    continue
                file.seek(member.offset_data)
                out.addfile(member, file)
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


def _whole(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Yields the files of a shard, up to where it is damaged."""
    with contextlib.suppress(tar_index.DamagedShard):
        for member in tar_index.members(file):
            if member.isfile() and not member.issparse():
                yield member


def _belongs(member: tarfile.TarInfo, contents: set[int], keys: set[str]) -> bool:
    """Returns whether a file belongs to the samples whose contents begin at these places.

    Files of other kinds belong to all samples of their key, of which there may be several.
    """
    if tar_index.kind_of(member.name) in tar_index.FILES:
        return member.offset_data in contents
    return _key(member) in keys


def _key(member: tarfile.TarInfo) -> str:
    return tar_index.key_of(member.name)
