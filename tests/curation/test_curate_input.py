"""Curation reads every kind of file, loses no good row, and counts the bad ones by reason."""

import json
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shards
from curated import run, selection

from clip_jax.errors import UserError

QUERIES = "dog\ngroß\n"
FOUND = [('Ein Hund, "groß"', "1", [1]), ("a dog of 3", "3", [0])]  # of three good rows


def jsonl(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet(path: Path) -> None:
    texts = [b'Ein Hund, "gro\xc3\x9f"', b"two cats", b"a dog of 3", None, b"dog \xff", b" ?"]
    pq.write_table(pa.table({"caption": texts, "extra": list("123456")}), path)


def tar(path: Path) -> None:
    members = []
    for key, text in zip("abc", ('Ein Hund, "groß"', "two cats", "a dog of 3")):
        record = {"caption": "unused", "extra": str(len(members) // 3 + 1)}
        members += [(f"{key}.jpg", b"image"), (f"{key}.txt", text.encode())]
        members += [(f"{key}.json", json.dumps(record).encode())]
    members += [("d.jpg", b"image"), ("e.txt", b"dog"), ("f.jpg", b""), ("f.txt", b"dog \xff")]
    members += [("g.jpg", b""), ("g.txt", b" ?"), ("../h.jpg", b""), ("../h.txt", b"dog")]
    shards.write_tar(path, members)


TABLES = {
    "x.parquet": parquet,
    "x.tar": tar,
    "x.csv": (
        'caption,extra\n"Ein Hund, ""groß""",1\ntwo cats,2\na dog of 3,3\n'
        "one,two,three\n ?,5\n".encode()
        + b"dog \xff,6\n"
    ),
    "x.tsv": (
        'caption\textra\nEin Hund, "groß"\t1\n"two cats\t2\na dog of 3\t3\n'
        "one\ttwo\tthree\n ?\t5\n".encode()
        + b"dog \xff\t6\n"
    ),
    "x.jsonl": jsonl(
        {"caption": 'Ein Hund, "groß"', "extra": 1},
        {"caption": ["two cats", "a dog"], "extra": 2},
        {"caption": "a dog of 3", "extra": 3},
        {"caption": None},
        {"caption": " ?"},
        ["dog"],
    )
    + b'{"caption": "dog \xff"}\n{"caption": "dog\n',
}
SKIPPED = {
    "x.parquet": {"no caption": 1, "invalid UTF-8 caption": 1, "empty caption": 1},
    "x.tar": {
        "no caption": 1,
        "no image": 1,
        "invalid UTF-8 caption": 1,
        "empty caption": 1,
        "unsafe file name": 2,
    },
    "x.csv": {"malformed row": 1, "invalid UTF-8 caption": 1, "empty caption": 1},
    "x.tsv": {"malformed row": 1, "invalid UTF-8 caption": 1, "empty caption": 1},
    "x.jsonl": {
        "no caption": 1,
        "invalid UTF-8 caption": 1,
        "empty caption": 1,
        "malformed row": 2,
    },
}


@pytest.mark.parametrize("name", TABLES)
def test_kinds_of_input(tmp_path: Path, name: str):
    content = TABLES[name]
    (tmp_path / "queries.txt").write_text(QUERIES)
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        content(tmp_path / name)
    report = run(tmp_path / name, tmp_path / "out", "--keep=extra")
    rows = selection(tmp_path / "out")
    assert [(row["caption"], row["extra"], row["queries"]) for row in rows] == FOUND
    assert [row["row"] for row in rows] == [0, 2]
    assert [row.get("key") for row in rows] == (["a", "c"] if name == "x.tar" else [None, None])
    assert report["skipped"] == SKIPPED[name]
    assert report["pairs"] == {"read": 3 + sum(SKIPPED[name].values()), "matched": 2, "kept": 2}


def test_text_and_files_without_header(tmp_path: Path):
    (tmp_path / "queries.txt").write_text(QUERIES)
    (tmp_path / "x.txt").write_bytes(b"two cats\r\na dog\r\n\ndog")
    assert run(tmp_path / "x.txt", tmp_path / "a")["skipped"] == {"empty caption": 1}
    assert [row["row"] for row in selection(tmp_path / "a")] == [1, 3]
    (tmp_path / "x.tsv").write_text("http://a\ta dog\nhttp://b\ttwo cats\n")
    run(
        tmp_path / "x.tsv", tmp_path / "b", "--column_names=url,alt", "--text_key=alt", "--keep=url"
    )
    assert [row["url"] for row in selection(tmp_path / "b")] == ["http://a"]


def test_damaged_and_missing_shards_lose_nothing_else(tmp_path: Path):
    (tmp_path / "queries.txt").write_text(QUERIES)
    tar(tmp_path / "whole.tar")
    cut = (tmp_path / "whole.tar").read_bytes()[: 512 * 9]  # a, and the header of b.jpg
    (tmp_path / "cut.tar").write_bytes(cut)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and then nothing of the kind")
    names = ("whole.tar", "cut.tar", "bad.parquet", "none.tar")
    report = run(",".join(str(tmp_path / name) for name in names), tmp_path / "out")
    assert report["skipped"] == SKIPPED["x.tar"] | {"damaged shard": 2, "missing shard": 1}
    assert Counter(row["key"] for row in selection(tmp_path / "out")) == {"a": 2, "c": 1}


def test_tars_hold_what_was_kept(tmp_path: Path):
    (tmp_path / "queries.txt").write_text("dog\n")
    members = []
    for i, text in enumerate(("a dog", "a cat", "the dog")):
        members += [*shards.sample(f"dir/{i:03}", text, shade=i), (f"dir/{i:03}.npy", bytes([i]))]
    shards.write_tar(tmp_path / "x.tar", members)
    run(tmp_path / "x.tar", tmp_path / "out", "--write_tars")
    (path,) = (tmp_path / "out" / "tars").glob("*.tar")
    with tarfile.open(path) as tar:
        found = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]
    assert found == members[:4] + members[8:]
    source = shards.open_source(type="tar", path=str(path))
    assert [text for _, text in shards.contents(source)] == ["a dog", "the dog"]
    with pytest.raises(UserError, match="holds samples that were chosen before"):
        run(tmp_path / "x.tar", tmp_path / "out")
