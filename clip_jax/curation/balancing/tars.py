"""Tar shards with fewer samples."""

import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import IO

from etils import epath

from clip_jax.curation import store
from clip_jax.data.tar_index import samples


def copy(source: epath.Path, target: epath.Path, rows: Sequence[int]) -> None:
    """Writes a shard of some samples of another, with all files of their keys.

    Args:
      source: a tar shard.
      target: written whole or not at all, and not if there are no rows.
      rows: numbers of the samples, by their first appearance in `source`.
    """
    if not rows:
        target.unlink(missing_ok=True)
        return
    with source.open("rb") as file, store.replacing(target) as temporary:
        found, _ = samples(file, Counter())
        contents = {span.offset for row in rows for span in found[row].values()}
        keys = {_key(member) for _, member in _members(file) if member.offset_data in contents}
        with temporary.open("wb") as sink, tarfile.open(fileobj=sink, mode="w") as out:
            for tar, member in _members(file):
                if _key(member) in keys:
                    out.addfile(member, tar.extractfile(member))
                    out.members = []  # type: ignore[misc]  # would grow by 1 KB each


def _members(file: IO[bytes]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The whole files of a shard, up to where it is damaged."""
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
