"""The stored index: what it saves, when it is made anew, and what reads through it."""

import os

import numpy as np
import pytest
from etils import epath
from shards import contents, sample, write_tar

from clip_jax.data.sources import shard_index, tar_index
from clip_jax.data.sources.tar import TarShards
from clip_jax.storage import writing


@pytest.fixture
def scans(monkeypatch) -> list[str]:
    """Names of the shards whose headers were read."""
    scanned: list[str] = []

    def scan(path: epath.Path) -> shard_index.ScanResult:
        scanned.append(path.name)
        return tar_index.scan(path)

    kind = shard_index.Kind("tar", tar_index.ROW, scan)
    monkeypatch.setattr(tar_index, "KIND", kind)
    return scanned


def write_shards(path, count: int = 3) -> None:
    for shard in range(count):
        members = [m for i in range(4) for m in sample(f"{i}", f"{shard} {i}", 9 * i)]
        write_tar(path / f"{shard:02}.tar", members)


class TestIndex:
    def test_is_made_once(self, tmp_path, scans):
        write_shards(tmp_path)
        first = contents(TarShards(str(tmp_path)))
        assert scans == ["00.tar", "01.tar", "02.tar"]
        source = TarShards(str(tmp_path))
        assert len(scans) == 3
        assert contents(source) == first
        assert first == [(f"{s:02}.tar/{i}", f"{s} {i}") for s in range(3) for i in range(4)]
        assert (tmp_path / "clip_jax.tar.index").exists()
        assert sorted(os.listdir(tmp_path))[-1] == "clip_jax.tar.index"  # nothing half-written

    def test_only_what_changed_is_read_again(self, tmp_path, scans):
        write_shards(tmp_path)
        TarShards(str(tmp_path))
        scans.clear()
        write_tar(tmp_path / "01.tar", sample("x", "new"))
        write_tar(tmp_path / "03.tar", sample("y", "newer"))
        (tmp_path / "00.tar").unlink()
        found = [text for _, text in contents(TarShards(str(tmp_path)))]
        assert found == ["new", "2 0", "2 1", "2 2", "2 3", "newer"]
        assert scans == ["01.tar", "03.tar"]

    def test_same_size_other_time(self, tmp_path, scans):
        write_shards(tmp_path, 1)
        TarShards(str(tmp_path))
        write_shards(tmp_path, 1)
        os.utime(tmp_path / "00.tar", ns=(1, 1))
        TarShards(str(tmp_path))
        assert scans == ["00.tar"] * 2

    def test_part_of_the_shards_and_any_order(self, tmp_path, scans):
        write_shards(tmp_path)
        TarShards(str(tmp_path))
        source = TarShards(f"{tmp_path}/02.tar,{tmp_path}/00.tar,{tmp_path}/02.tar")
        assert [text[0] for _, text in contents(source)] == [*"222200002222"]
        assert len(scans) == 3

    def test_problems_are_remembered(self, tmp_path, scans):
        write_tar(tmp_path / "0.tar", [*sample("a", "whole"), ("b.png", b"x"), ("/c.png", b"")])
        data = (tmp_path / "0.tar").read_bytes()
        (tmp_path / "1.tar").write_bytes(data[:3000])
        paths = str(tmp_path / "{0..2}.tar")
        first = TarShards(paths).problems
        assert first == {"no caption": 1, "damaged shard": 2, "unsafe file name": 1}
        assert TarShards(paths).problems == first
        assert scans == ["0.tar", "1.tar", "2.tar", "2.tar"]  # a missing one is looked for anew

    def test_place_that_cannot_be_written_to(self, tmp_path, scans, monkeypatch, caplog):
        write_shards(tmp_path)
        write = writing.write

        def refuse(path: epath.Path, contents: bytes) -> None:
            if path.parent == tmp_path:
                raise PermissionError(f"{path} is read-only")
            write(path, contents)

        monkeypatch.setattr(writing, "write", refuse)
        fallback_dir = epath.Path(tmp_path / "run" / "index")
        for _ in range(2):
            assert len(TarShards(str(tmp_path), fallback_dir=fallback_dir)) == 12
        assert len(scans) == 3
        assert [path.suffix for path in fallback_dir.iterdir()] == [".index"]
        assert len(TarShards(str(tmp_path))) == 12  # with no place at all
        assert "read-only" in caplog.text

    @pytest.mark.parametrize("damage", [b"", b"ARROW1 but not really", None])
    def test_damaged_index_is_made_anew(self, tmp_path, scans, damage):
        write_shards(tmp_path)
        first = contents(TarShards(str(tmp_path)))
        path = tmp_path / "clip_jax.tar.index"
        path.write_bytes(path.read_bytes()[:-40] if damage is None else damage)
        assert contents(TarShards(str(tmp_path))) == first
        assert len(scans) == 6

    def test_processes_find_the_same(self, tmp_path):
        write_shards(tmp_path, 20)
        paths = [epath.Path(path) for path in sorted(tmp_path.glob("*.tar"))]
        several = shard_index.load(paths, tar_index.KIND, workers=2)
        for path, found in zip(paths, several):
            np.testing.assert_array_equal(found.rows, tar_index.scan(path).rows)
            assert len(found.rows) == 4
