"""clip_jax.storage: the same for local paths and a bucket, and what becomes of its failures."""

import io
import logging
import os
import pathlib
import socket
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from etils import epath

from clip_jax.errors import StorageError, UserError
from clip_jax.storage import faults, locations, ranges, writing

DATA = np.random.default_rng(0).bytes(300_000)


@pytest.fixture(params=["local", "gs"])
def place(request, tmp_path) -> epath.Path:
    """An empty directory, on disk and in a bucket."""
    if request.param == "local":
        return epath.Path(tmp_path)
    request.getfixturevalue("bucket")
    return epath.Path(f"gs://bucket/{tmp_path.name}-{time.monotonic_ns()}")


@pytest.fixture
def remote(bucket, tmp_path) -> epath.Path:
    return epath.Path(f"gs://bucket/{tmp_path.name}-{time.monotonic_ns()}")


@pytest.fixture
def hurry(monkeypatch):
    """Gives up after a second."""
    monkeypatch.setattr(faults, "RETRY_FOR", 1.0)


# ---- Paths ---------------------------------------------------------------------------------------


def test_lists_patterns_and_directories(place):
    for name in ("a.tar", "b.tar", "c.txt", "sub/d.tar"):
        writing.write(place / name, name)
    assert locations.expand(f"{place}/*.tar", ".tar") == [place / "a.tar", place / "b.tar"]
    assert locations.expand(str(place), ".tar") == [place / "a.tar", place / "b.tar"]
    assert locations.expand(f"{place}/*/d.tar", ".tar") == [place / "sub/d.tar"]
    named = f"{place}/{{0..1}}.tar,{place}/c.txt"
    assert locations.expand(named, ".tar") == [place / "0.tar", place / "1.tar", place / "c.txt"]
    assert locations.expand(f"{place}/*.zip", ".tar") == []
    assert locations.tree(place) == ["a.tar", "b.tar", "c.txt", "sub/d.tar"]


@pytest.mark.parametrize("count", [2, 20])
def test_sizes_and_versions(place, count):
    paths = [place / f"{i}" for i in range(count)]
    for i, path in enumerate(paths):
        writing.write(path, b"x" * i)
    found = locations.stats([*paths, place / "none"])
    assert [stat and stat.size for stat in found] == [*range(count), None]
    assert locations.stat(paths[1]) == found[1]
    time.sleep(0.02)  # more than the resolution of a file system's clock
    writing.write(paths[1], b"y")
    assert locations.stat(paths[1]).size == 1
    assert locations.stat(paths[1]).version != found[1].version


def test_many_sizes_in_one_request(bucket, remote):
    for i in range(30):
        bucket.put("bucket", f"{remote.name}/{i}", b"x")
    bucket.stats(reset=True)
    assert all(locations.stats([remote / f"{i}" for i in range(30)]))
    assert bucket.stats()["requests"] == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("https://host/a.tar", r"https:// is not read; download"),
        ("hf://org/set", r"hf:// is not read"),
        ("pipe:cat a.tar", r"pipe:.*is not read"),
        ("gs:/bucket/a.tar", r"two slashes"),
        ("gs:///a.tar", r"no bucket"),
        ("a.tar::b.tar", r"with commas, not with ::"),
    ],
)
def test_what_is_not_read_is_said(path, message):
    with pytest.raises(UserError, match=f"{message}(.|\n)*gs://BUCKET"):
        locations.expand(path, ".tar")


# ---- Reading -------------------------------------------------------------------------------------


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
    ("size", "share", "requests"), [(3_000_000, 0.05, 25), (20_000, 1.01, 30)], ids=["jump", "read"]
)
def test_passing_through_headers(bucket, remote, size, share, requests):
    data = write_tar([size] * (60_000_000 // size // 3))
    bucket.put("bucket", f"{remote.name}/file", data)
    bucket.stats(reset=True)
    with ranges.scanning(remote / "file") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        found = [member.size for member in tar]
    assert found == [size] * (60_000_000 // size // 3)
    stats = bucket.stats()
    assert stats["bytes_out"] < share * len(data) + 2**17
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


# ---- Writing -------------------------------------------------------------------------------------


def test_whole_or_not_there(place):
    with writing.replacing(place / "a") as temporary:
        temporary.write_bytes(DATA)
    with pytest.raises(KeyError), writing.replacing(place / "b") as temporary:  # noqa: PT012
        temporary.write_bytes(DATA)
        raise KeyError
    with writing.replacing_folder(place / "folder") as temporary:
        (temporary / "in").mkdir(parents=True)
        (temporary / "in" / "c").write_bytes(b"c")
    with pytest.raises(KeyError), writing.replacing_folder(place / "other") as temporary:  # noqa: PT012
        temporary.mkdir()
        (temporary / "d").write_bytes(b"d")
        raise KeyError
    assert locations.tree(place) == ["a", "folder/in/c"]
    assert ranges.read(place / "a") == DATA


def test_files_that_grow(place):
    growing = writing.Growing(place / "logs")
    for line in ("one\n", "two\n"):
        with (growing.local / "log").open("a") as file:
            file.write(line)
        growing.flush()
        assert ranges.read(place / "logs" / "log").decode().endswith(line)
    with (growing.local / "log").open("a") as file:
        file.write("three\n")
    growing.close()
    assert ranges.read(place / "logs" / "log") == b"one\ntwo\nthree\n"


def test_logs_outlive_an_outage(bucket, remote, hurry, caplog):
    growing = writing.Growing(remote)
    (growing.local / "log").write_text("one\n")
    bucket.faults([{"match": "POST", "kind": 403}])
    growing.flush()
    assert "not there yet" in caplog.text
    bucket.faults([])
    growing.close()
    assert bucket.get("bucket", f"{remote.name}/log") == b"one\n"


# ---- Failures ------------------------------------------------------------------------------------

REASONS = {
    503: "HTTP 503",
    429: "HTTP 429",
    "reset": "connection broken",
    "truncate": "connection broken",
}


@pytest.mark.parametrize("kind", REASONS, ids=str)
def test_what_passes_is_waited_out_and_counted(bucket, remote, kind, caplog):
    bucket.put("bucket", f"{remote.name}/file", DATA)
    bucket.faults([{"match": "GET .*file", "kind": kind, "count": 3}])
    with caplog.at_level(logging.WARNING):
        assert ranges.start(remote / "file", [(7, 500)])() == [DATA[7:507]]
    if kind == "reset" and not faults.counts():
        return  # curl itself has asked again, as it does where it had used a connection before
    assert faults.counts()[REASONS[kind]] >= 1
    assert f"Storage: {REASONS[kind]} at {remote}/file" in caplog.text
    assert caplog.text.count(REASONS[kind]) == 1  # not a line each


def test_failures_of_other_requests_are_counted_too(bucket, remote):
    bucket.faults([{"match": "POST", "kind": 503, "count": 1}])
    writing.write(remote / "file", DATA)
    assert ranges.read(remote / "file") == DATA
    assert faults.counts() == {"HTTP 503": 1}


def test_silence_is_ended(bucket, remote, monkeypatch):
    bucket.put("bucket", f"{remote.name}/file", DATA)
    monkeypatch.setattr(ranges, "_STALL", 0.3)
    bucket.faults([{"match": "GET", "kind": "stall", "count": 1, "seconds": 20}])
    assert ranges.start(remote / "file", [(0, 5)])() == [DATA[:5]]
    assert faults.counts() == {"no answer": 1}


def test_in_the_end_it_is_a_sentence(bucket, remote, hurry):
    bucket.put("bucket", f"{remote.name}/file", DATA)
    bucket.faults([{"match": "GET", "kind": 503}])
    with pytest.raises(StorageError, match=r"file could not be reached for 1 s.*unavailabl"):
        ranges.start(remote / "file", [(0, 5)])()


def test_no_such_bucket(bucket):
    with pytest.raises(UserError, match=r"no such bucket.*'buckett'"):
        locations.expand("gs://buckett/shards/*.tar", ".tar")


@pytest.mark.parametrize(
    ("rights", "message"),
    [("none", r"lack the right.*Storage Object Viewer"), ("expired", r"refused, or have expired")],
)
def test_no_rights(bucket, remote, rights, message):
    bucket.put("bucket", f"{remote.name}/file", DATA)
    bucket.rights("bucket", rights)
    with pytest.raises(UserError, match=message):
        ranges.start(remote / "file", [(0, 5)])()


def test_read_only(bucket, remote):
    bucket.rights("bucket", "read")
    with pytest.raises(UserError, match=r"lack the right.*Storage Object User"):
        writing.write(remote / "file", DATA)


def test_rights_that_come_back(bucket, remote, caplog):
    """Credentials that expire in mid-run are renewed; whoever had access is waited for."""
    bucket.put("bucket", f"{remote.name}/file", DATA)
    ranges.start(remote / "file", [(0, 5)])()
    bucket.faults([{"match": "GET", "kind": 401, "count": 2}])
    assert ranges.start(remote / "file", [(0, 5)])() == [DATA[:5]]
    assert faults.counts() == {"HTTP 401": 2}


def test_a_missing_local_file_is_no_failure_of_storage(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        ranges.read(epath.Path(tmp_path / "none"))
    assert faults.explained(caught.value) == ""


# ---- s3:// ---------------------------------------------------------------------------------------

_S3 = """
import pathlib, sys
from clip_jax.storage import locations, ranges, remote, writing

remote.filesystem("s3://bucket").mkdir("bucket")
place = locations.parse("s3://bucket/folder")
data = bytes(range(256)) * 1000
writing.write(place / "a.bin", data)
with writing.replacing(place / "b.bin") as temporary:
    temporary.write_bytes(data[::-1])
assert locations.expand(f"{place}/*.bin", ".bin") == [place / "a.bin", place / "b.bin"]
stat = locations.stat(place / "b.bin")
assert stat.size == len(data)
assert ranges.start(place / "b.bin", [(5, 3), (250_000, 7)], stat.version)() == [
    data[::-1][5:8], data[::-1][250_000:250_007]
]
writing.write(place / "b.bin", data)
try:
    ranges.start(place / "b.bin", [(5, 3)], stat.version)()
except ranges.Replaced:
    print("replaced")
try:
    locations.expand("s3://buckett/*.bin", ".bin")
except Exception as error:
    print(error)
"""


def test_s3():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    credentials = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    places = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_REGION": "us-east-1"}
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        found = subprocess.run(
            [sys.executable, "-c", _S3],
            cwd=pathlib.Path(__file__).parents[2],
            env={**os.environ, **credentials, **places, "no_proxy": "127.0.0.1"},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        server.kill()
    assert found.returncode == 0, found.stderr
    replaced, sentence = found.stdout.splitlines()
    assert replaced == "replaced"
    assert "no such bucket or object" in sentence
    assert "'buckett'" in sentence
