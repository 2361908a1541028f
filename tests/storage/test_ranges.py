"""clip_jax.storage.ranges: the same for local paths and a bucket, in few requests."""

import io
import tarfile
import time

import numpy as np
import pytest

from clip_jax.storage import locations, ranges, writing

DATA = np.random.default_rng(0).bytes(300_000)


def test_parts_of_a_file(place):
    path = place / "file"
    writing.write(path, DATA)
    spans = [(200_000, 10), (0, 5), (3, 4), (299_995, 50), (100_000, 0), (400_000, 10)]
    wanted = [DATA[offset : offset + size] for offset, size in spans]
    assert ranges.start(path, spans)() == wanted
    assert ranges.start(path, spans[:3], locations.stat(path).version)() == wanted[:3]
    assert ranges.start_whole(path)() == ranges.read(path) == DATA


def test_another_file_under_the_same_name(place):
    path = place / "file"
    writing.write(path, DATA)
    version = locations.stat(path).version
    time.sleep(0.02)
    writing.write(path, DATA[::-1])
    with pytest.raises(ranges.Replaced, match=r"file was replaced since its index was made"):
        ranges.start(path, [(0, 5)], version)()


def test_missing_file(place):
    for read in (ranges.start(place / "none", [(0, 5)]), lambda: ranges.read(place / "none")):
        with pytest.raises(FileNotFoundError):
            read()


def test_near_parts_in_one_request_and_no_more_bytes_than_needed(bucket, remote):
    bucket.put("bucket", f"{remote.name}/file", DATA)
    bucket.stats(reset=True)
    ranges.start(remote / "file", [(0, 100), (1_000, 100), (250_000, 100)])()
    stats = bucket.stats()
    assert stats["read"] == 2
    assert stats["bytes_out"] == 1_100 + 100


def test_reads_are_under_way_together(bucket, remote):
    bucket.put("bucket", f"{remote.name}/file", DATA)
    ranges.start(remote / "file", [(0, 1)])()
    bucket.latency(0.2)
    began = time.monotonic()
    reads = [ranges.start(remote / "file", [(i, 1)]) for i in range(40)]
    assert [read()[0] for read in reads] == [DATA[i : i + 1] for i in range(40)]
    assert time.monotonic() - began < 4  # one after the other they would take 8


def write_tar(sizes: list[int]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for i, size in enumerate(sizes):
            member = tarfile.TarInfo(f"{i}.jpg")
            member.size = size
            tar.addfile(member, io.BytesIO(bytes(size)))
    return made.getvalue()


@pytest.mark.parametrize(
    ("size", "fraction", "requests"),
    [(3_000_000, 0.05, 25), (20_000, 1.01, 30)],
    ids=["jump", "read"],
)
def test_passing_through_headers(bucket, remote, size, fraction, requests):
    data = write_tar([size] * (60_000_000 // size // 3))
    bucket.put("bucket", f"{remote.name}/file", data)
    bucket.stats(reset=True)
    with ranges.scanning(remote / "file") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        found = [member.size for member in tar]
    assert found == [size] * (60_000_000 // size // 3)
    stats = bucket.stats()
    assert stats["bytes_out"] < fraction * len(data) + 2**17
    assert stats["requests"] <= requests


def test_copy_for_mapping_is_made_once_a_version(bucket, remote, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = remote / "file"
    for data in (DATA, DATA[::-1]):
        writing.write(path, data)
        stat = locations.stat(path)
        assert ranges.local_copy(path, stat).read_bytes() == data
        bucket.stats(reset=True)
        assert ranges.local_copy(path, stat).read_bytes() == data
        assert bucket.stats()["requests"] == 0
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 1  # the old one has gone
