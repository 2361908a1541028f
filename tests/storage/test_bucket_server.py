"""The bucket server, asked by the clients that gs:// paths are read and written with."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection

import pytest
from bucket_server import FAULTS, Server

BIG = os.urandom(12 << 20)

# A process of its own: TensorStore reads its environment once.
TENSORSTORE = """
import tensorstore as ts

kv = ts.KvStore.open("gs://bucket/run/").result()
first = kv.write("a b/é", b"hello").result().generation
kv.write("big", bytes(9 << 20)).result()
assert kv.read("a b/é").result().value == b"hello"
assert kv.read("a b/é", byte_range=slice(1, 3)).result().value == b"el"
assert kv.read("a b/é", byte_range=slice(-2, None)).result().value == b"lo"
assert kv.read("missing").result().state == "missing"
assert kv.read("a b/é", if_not_equal=first).result().state == "unspecified"
second = kv.write("a b/é", b"again", if_equal=first).result().generation
assert second not in (b"", first)
assert kv.write("a b/é", b"late", if_equal=first).result().generation == b""
assert kv.read("a b/é").result().value == b"again"
assert kv.list().result() == ["a b/é".encode(), b"big"]
kv.delete_range(ts.KvStore.KeyRange("b", "c")).result()
assert kv.list().result() == ["a b/é".encode()]
assert len(ts.KvStore.open("gs://bucket/").result().list().result()) == 1202
"""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server("bucket") as server:
        yield server


@pytest.fixture
def fs(server):
    core = pytest.importorskip("gcsfs.core")
    options = {"skip_instance_cache": True, "use_listings_cache": False}
    return core.GCSFileSystem(endpoint_url=server.url, token="anon", **options)


def ask(server: Server, method: str, path: str, body=None, **headers: str) -> tuple:
    """Status, Range or Location, and body of an answer, without a client of Google's."""
    with contextlib.closing(HTTPConnection(server.url[7:])) as connection:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, names)
        answer = connection.getresponse()
        place = answer.headers["Range"] or answer.headers["Location"]
        return answer.status, place, answer.read()


def test_gcsfs_writes_and_reads(server, fs):
    for content in (b"", b"hi\r", b"hi\r\n", b"\n--==0==", os.urandom(3000)):
        fs.pipe_file("bucket/d/small", content)
        assert fs.cat_file("bucket/d/small") == server.get("bucket", "d/small") == content
    with fs.open("bucket/d/a big", "wb", consistency="size") as file:
        for start in range(0, len(BIG), 3 << 20):
            file.write(BIG[start : start + (3 << 20)])
    assert server.get("bucket", "d/a big") == BIG
    assert server.stats()["write_part"] == 3  # the begin, and two blocks before the last
    assert fs.cat_file("bucket/d/a big", 1000, 24000) == BIG[1000:24000]
    with fs.open("bucket/d/a big", "rb") as file:
        file.seek(-10, 2)
        assert file.read() == BIG[-10:]
    big, small = fs.ls("bucket/d", detail=True)
    assert (big["name"], big["size"]) == ("bucket/d/a big", len(BIG))
    assert (small["name"], small["size"]) == ("bucket/d/small", 3000)
    assert abs(small["mtime"].timestamp() - time.time()) < 10
    assert fs.exists("bucket/d/small")
    assert fs.isdir("bucket/d")
    assert not fs.exists("bucket/d/other")
    assert not fs.exists("nowhere")
    assert fs.glob("bucket/*/a*") == ["bucket/d/a big"]
    with pytest.raises(FileExistsError):
        fs.pipe_file("bucket/d/small", b"", mode="create")
    assert server.requests()[-1]["status"] == 412


def test_gcsfs_moves_and_removes(server, fs, monkeypatch):
    fs.pipe({f"bucket/run/{name}": name.encode() for name in ("a", "b/c", "b/d e")})
    fs.mv("bucket/run/a", "bucket/run/z")
    fs.mv("bucket/run/b", "bucket/new", recursive=True)
    fs.copy("bucket/new/c", "bucket/new/copy")
    assert server.names("bucket") == ["new/c", "new/copy", "new/d e", "run/z"]
    assert server.stats()["move"] == 4  # one of them of the folder, in vain
    fs.merge("bucket/run/joined", ["bucket/run/z", "bucket/new/copy"])
    assert server.get("bucket", "run/joined") == b"ab/c"
    assert fs.setxattrs("bucket/run/z", step="7") == {"step": "7"}
    fs.rm("bucket/run", recursive=True)
    assert server.names("bucket") == ["new/c", "new/copy", "new/d e"]
    monkeypatch.setattr(type(fs), "on_google", True)  # where it removes many at a time
    server.requests(reset=True)
    fs.rm("bucket/new", recursive=True)
    assert [r["path"] for r in server.requests()] == ["/storage/v1/b/bucket/o", "/batch/storage/v1"]
    assert server.names("bucket") == []


def test_pages_of_names_and_tensorstore(server, fs):
    for i in range(1201):
        server.put("bucket", f"many/{i:04}/x", b"")
    assert len(fs.find("bucket/many")) == len(fs.ls("bucket/many")) == 1201
    assert [r["query"].count("pageToken") for r in server.requests()] == [0, 1, 0, 1]
    command = [sys.executable, "-c", TENSORSTORE]
    subprocess.run(command, env={**os.environ, **server.env}, check=True, timeout=60)


def test_uploads_in_parts(server):
    path = "/upload/storage/v1/b/bucket/o?name=x&uploadType="
    assert ask(server, "POST", f"{path}media", iter([b"in ", b"chunks"]))[0] == 200
    assert server.get("bucket", "x") == b"in chunks"
    place = ask(server, "POST", f"{path}resumable", b"{}")[1]
    for body, span in ((b"abcd", "0-3"), (None, "*")):  # some, and then: how much has arrived?
        answer = ask(server, "PUT", place, body, Content_Range=f"bytes {span}/*")
        assert answer[:2] == (308, "bytes=0-3")
    for _ in range(2):  # whoever has not seen the last answer asks again
        assert ask(server, "PUT", place, b"ef", Content_Range="bytes 4-5/6")[0] == 200
    assert server.get("bucket", "x") == b"abcdef"
    place = ask(server, "POST", f"{path}resumable", b"{}")[1]
    assert [ask(server, "DELETE", place)[0] for _ in range(2)] == [499, 404]
    answer = ask(server, "GET", "/download/storage/v1/b/bucket/o/x", Range="bytes=6-")
    assert (answer[0], b"not satisfiable" in answer[2]) == (416, True)


def test_rights(server, fs):
    fs.pipe_file("bucket/x", b"x")
    server.rights("bucket", "objects")
    assert fs.exists("bucket")  # by a listing: the bucket itself may not be asked for
    assert [r["status"] for r in server.requests()[-2:]] == [403, 200]
    server.rights("bucket", "read")
    assert fs.cat_file("bucket/x") == b"x"
    for deny in (lambda: fs.pipe_file("bucket/y", b""), lambda: fs.rm_file("bucket/x")):
        with pytest.raises(OSError, match="Forbidden"):
            deny()
    server.rights("bucket", "none")
    with pytest.raises(OSError, match="Forbidden"):
        fs.cat_file("bucket/x")
    server.rights("bucket", "expired")
    status, _, body = ask(server, "GET", "/storage/v1/b/bucket/o/x")
    assert (status, b"Invalid Credentials" in body) == (401, True)
    with pytest.raises(ValueError, match="rights"):
        server.rights("bucket", "some")


def test_faults(server, fs):
    kinds = sorted(map(str, FAULTS))
    for kind in kinds:
        server.put("bucket", kind, b"content")
    server.faults(
        [{"match": f"GET .*/{k}\\?", "kind": k, "count": 1, "seconds": 0.1} for k in FAULTS]
    )
    found = fs.cat([f"bucket/{kind}" for kind in kinds], on_error="return")  # at the same time
    errors = {name: type(v) for name, v in found.items() if v != b"content"}
    assert errors == {"bucket/403": OSError, "bucket/404": FileNotFoundError}
    stats = server.stats()
    assert [stats[f"fault_{kind}"] for kind in kinds] == [1] * len(kinds)
    log = [(r["status"], r["sent"]) for r in server.requests() if r["path"].endswith("truncate")]
    assert log == [(200, 3), (200, 7)]
    server.faults([{"kind": 503, "p": 0.5, "for": 0.5}])
    statuses = [ask(server, "GET", "/storage/v1/b/bucket")[0] for _ in range(40)]
    assert 10 < statuses.count(503) < 30
    time.sleep(0.5)
    assert {ask(server, "GET", "/storage/v1/b/bucket")[0] for _ in range(10)} == {200}


def test_latency_of_several_requests_overlaps(server, fs):
    names = [f"bucket/{i}" for i in range(32)]
    fs.pipe(dict.fromkeys(names, b"x"))
    server.latency(0.2)
    start = time.monotonic()
    assert len(fs.cat(names)) == 32
    assert 0.2 < time.monotonic() - start < 2


def test_ends_with_its_parent(server):
    server.process.stdin.close()
    assert server.process.wait(5) == 0
