"""The stored index: what it saves, when it is made anew, and what reads through it."""

import os
import threading
import time

import numpy as np
import pytest
import tensorflow as tf
from etils import epath
from shards import contents, open_source, picture, sample, write_tar

from clip_jax.data.sources import shard_index, tar_index, tfrecord
from clip_jax.data.sources.reading import ChunkCache
from clip_jax.data.sources.tar import TarShards
from clip_jax.errors import BadExample, UserError
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


class TestChunks:
    def test_same_examples_with_fewer_reads(self, tmp_path, monkeypatch):
        write_shards(tmp_path)
        expected = contents(TarShards(str(tmp_path)))
        opened = []
        start = TarShards._start_neighbours
        monkeypatch.setattr(
            TarShards,
            "_start_neighbours",
            lambda self, *span: opened.append(span) or start(self, *span),
        )
        source = TarShards(str(tmp_path), chunk=3, cached_chunks=2)
        assert contents(source) == expected
        # Chunks of 3 over shards of 4: the second and the third cross from one to the next.
        assert opened == [(0, 3), (3, 4), (4, 6), (6, 8), (8, 9), (9, 12)]
        assert source[1].image == picture(9)

    def test_one_bad_sample_does_not_lose_its_neighbours(self, tmp_path):
        write_shards(tmp_path, 1)
        source = TarShards(str(tmp_path), chunk=4, cached_chunks=1)
        path = tmp_path / "00.tar"
        stat = path.stat()
        path.write_bytes(path.read_bytes()[:7000])
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a damaged disk would
        texts = []
        for index in range(4):
            try:
                texts.append(source[index].text)
            except BadExample as bad:
                texts.append(bad.reason)
        assert texts == ["0 0", "0 1", "truncated shard", "truncated shard"]

    def test_each_chunk_is_read_once_by_many_threads(self):
        reads = []

        def start(number: int):
            def wait() -> int:
                reads.append(number)
                time.sleep(0.02)
                return number * 10

            return wait

        cache, got = ChunkCache(start, capacity=3), []
        threads = [threading.Thread(target=lambda: got.append(cache.start(7)())) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == [70] * 8
        assert reads == [7]
        assert [cache.start(number)() for number in (1, 2, 3, 7)] == [10, 20, 30, 70]
        assert reads == [7, 1, 2, 3, 7]  # 7 had been longest unused

    def test_a_failed_read_is_tried_again(self):
        outcomes = iter([OSError("gone"), "back"])

        def wait() -> str:
            outcome = next(outcomes)
            if isinstance(outcome, OSError):
                raise outcome
            return outcome

        cache = ChunkCache(lambda _: wait, capacity=2)
        with pytest.raises(OSError, match="gone"):
            cache.start(0)()
        assert cache.start(0)() == "back"

    def test_replaced_shard(self, tmp_path):
        """Its bytes are no longer those that the index describes."""
        write_shards(tmp_path, 2)
        source = TarShards(str(tmp_path))
        path = tmp_path / "00.tar"
        path.write_bytes((tmp_path / "01.tar").read_bytes())
        with pytest.raises(BadExample, match=r"00\.tar.*replaced shard.*since its index was made"):
            source[0]
        assert source[4].text == "1 0"
        assert TarShards(str(tmp_path))[0].text == "1 0"


def write_records(path, records: list[bytes]) -> None:
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)


def example(**features) -> bytes:
    def feature(value) -> tf.train.Feature:
        values = value if isinstance(value, list) else [value]
        if isinstance(values[0], int):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=values))
        encoded = [v if isinstance(v, bytes) else v.encode() for v in values]
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=encoded))

    named = {name: feature(value) for name, value in features.items()}
    return tf.train.Example(features=tf.train.Features(feature=named)).SerializeToString()


class TestTfRecords:
    def test_against_tensorflows_writer(self, tmp_path):
        records = [bytes([i]) * (i * 7) for i in range(50)]
        write_records(tmp_path / "a", records)
        path = epath.Path(tmp_path / "a")
        for _ in range(2):  # scanned, then from the index
            source = tfrecord.TfRecords([path, path], [slice(3, None), slice(0, 2)], None)
            assert [source[i] for i in range(len(source))] == records[3:] + records[:2]
            assert source.stored == [50, 50]

    def test_examples(self, tmp_path):
        first = example(image=picture(1), caption=["one", "uno"], kind=["dog", "cat"], id=3)
        second = example(image=picture(2), caption="two", kind="dog")
        write_records(tmp_path / "train.tfrecord", [first, second, b"\xff", example(caption="x")])
        spec = {"type": "tfrecord", "path": str(tmp_path / "*.tfrecord")}
        source = open_source(**spec, label_key="kind", text_key="caption")
        assert [source[i].image for i in range(2)] == [picture(1), picture(2)]
        assert source[0].captions.texts == ("one", "uno")
        assert [source[0].labels, source[1].labels] == [(1, 0), (1,)]
        assert source.class_names == ("cat", "dog")
        grouped = open_source(**spec, group_keys="id,kind")
        assert [grouped[i].groups for i in range(2)] == [("3", "dog"), ("", "dog")]
        assert open_source(**spec)[1].text == "two"
        for index, reason in ((2, "unreadable record"), (3, "no image")):
            with pytest.raises(BadExample) as caught:
                source[index]
            assert caught.value.reason == reason
        with pytest.raises(UserError, match=r"image_key.*caption, id, image, kind"):
            open_source(**spec, image_key="picture")

    def test_nothing_found(self, tmp_path):
        with pytest.raises(UserError, match="No records in the 0 file"):
            open_source(type="tfrecord", path=str(tmp_path))
