"""The data commands from a bucket and to one: what they write is what they write on disk."""

import json
import pathlib
import time

import pyarrow.parquet as pq
import pytest
import tiny_data
from etils import epath
from shards import write_tar

from clip_jax.curation import cli
from clip_jax.storage import locations, ranges

WORDS = ("a red dog", "a small cat", "the old house", "a red cat")


@pytest.fixture
def places(bucket, tmp_path) -> tuple[str, str]:
    """Two directories of equal shards, on disk and in the bucket; some images come twice."""
    prefix = f"tools-{time.monotonic_ns()}"
    for shard in range(2):
        members = []
        for i in range(shard * 20, shard * 20 + 20):
            image = tiny_data.encoded(tiny_data.picture(i % 33), "PNG" if i < 33 else "BMP")
            members += tiny_data.sample(f"{i:03}", image, f"{WORDS[i % 4]} {i}")
        path = tmp_path / f"{shard}.tar"
        write_tar(path, members)
        bucket.put("bucket", f"{prefix}/{path.name}", path.read_bytes())
    return str(tmp_path), f"gs://bucket/{prefix}"


def run(*arguments: str) -> None:
    cli.main([*arguments, "--workers=1"])


def files(folder: str) -> list[str]:
    return locations.tree(epath.Path(folder))


def read(path: str) -> bytes:
    return ranges.read(epath.Path(path))


def test_stats(places, capsys):
    found = []
    for place in places:
        run("stats", f"{place}/*.tar", f"--json={place}/s.json", f"--html={place}/s.html")
        found.append(json.loads(read(f"{place}/s.json")))
        assert b"<html" in read(f"{place}/s.html")
        assert place in capsys.readouterr().out
    local, remote = found
    differing = {name for name in local if local[name] != remote[name]}
    assert differing <= {"data"}


def test_dedup_then_pack(places):
    for place in places:
        run("dedup", f"{place}/*.tar", f"--out={place}/dedup")
        keep = f"--keep={place}/dedup/keep.txt"
        cli.main(["pack", f"{place}/*.tar", f"{place}/clean", keep, "--workers=1"])
    local, remote = places
    kept = read(f"{local}/dedup/keep.txt")
    assert kept == read(f"{remote}/dedup/keep.txt")
    assert len(kept.splitlines()) == 33
    assert read(f"{local}/clean/00000.tar") == read(f"{remote}/clean/00000.tar")
    assert files(f"{local}/dedup") == files(f"{remote}/dedup")


def test_curate(places):
    for place in places:
        queries = f"--out={place}/queries.txt"
        text = pathlib.Path(places[0]) / "text.txt"
        text.write_text("\n".join(f"{words} {i}" for i in range(30) for words in WORDS))
        cli.main(["curate", "queries", f"--text={text}", "--min_count=20", queries])
        arguments = [f"--queries={place}/queries.txt", "--per_query=8", f"--out={place}/curated"]
        cli.main(["curate", "pairs", f"{place}/*.tar", *arguments, "--write_tars"])
    local, remote = places
    assert read(f"{local}/queries.txt") == read(f"{remote}/queries.txt")
    assert b"red" in read(f"{local}/queries.txt")
    for name in ("counts.parquet", "report.json"):
        assert name in files(f"{remote}/curated")
    counts = [
        pq.read_table(ranges.local_copy(path, locations.stat(path))).to_pydict()
        for path in (epath.Path(f"{place}/curated/counts.parquet") for place in places)
    ]
    assert counts[0] == counts[1]
    tars = [sorted(n for n in files(f"{p}/curated") if n.endswith(".tar")) for p in places]
    assert len(tars[0]) == len(tars[1]) == 2
    sizes = [sum(len(read(f"{p}/curated/{n}")) for n in names) for p, names in zip(places, tars)]
    assert sizes[0] == sizes[1]


def test_result_that_cannot_be_written_is_an_error(places, bucket):
    bucket.rights("bucket", "read")
    for command in (["stats", "--json={}/s.json"], ["check", "--out={}/c.jsonl"], ["index"]):
        arguments = [argument.format(places[1]) for argument in command[1:]]
        with pytest.raises(SystemExit) as caught:
            run(command[0], f"{places[1]}/*.tar", *arguments)
        assert caught.value.code == 2
