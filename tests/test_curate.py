"""Curation: exact matches, balanced samples, one result however it was come by."""

import contextlib
import json
import random
import signal
import subprocess
import sys
import tarfile
import time
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_jax.curation import curate, matching, sampling
from clip_jax.errors import UserError
from tests import shards

COMMAND = [sys.executable, "-m", "clip_jax", "data", "curate", "pairs"]
ROOT = Path(__file__).parents[1]


def words_of(text: str) -> list[str]:
    """Independent of pyarrow."""
    text = unicodedata.normalize("NFKC", text).lower()
    return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text).split()


def holds(caption: str, query: str) -> bool:
    return f" {' '.join(words_of(query))} " in f" {' '.join(words_of(caption))} "


def some_captions(count: int, seed: int) -> list[str]:
    """Few words, so that they repeat; each may carry capitals, accents and punctuation."""
    rng = random.Random(seed)
    words = ["a", "B", "c", "dé", "Éf", "ｇ", "h9", "ab", "a-b", "it's", "²", "日本"]
    glue = [" ", "  ", ", ", "-", "… ", " & "]
    return [
        "".join(rng.choice(words) + rng.choice(glue) for _ in range(rng.randrange(12)))
        for _ in range(count)
    ]


def run(data: Path | str, output: Path, *options: str) -> dict:
    """Runs in this process; returns the report."""
    queries = output.parent / "queries.txt"
    curate.main(
        ["pairs", str(data), f"--queries={queries}", f"--output={output}", "--workers=1", *options]
    )
    return json.loads((output / "report.json").read_text())


def selection(output: Path) -> list[dict]:
    """All pairs kept, in order."""
    found = sorted((output / "selection").glob("*.parquet"))
    return [row for path in found for row in pq.read_table(path).to_pylist()]


# ---- Matching ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*some_captions(50, 1), "", "!?", "İSTANBUL\u3000x", "a\u00adb"])
def test_normalise(text: str):
    assert matching.normalise(pa.array([text]))[0].as_py().split() == words_of(text)


def test_matches_are_those_of_brute_force():
    captions = some_captions(2000, seed=2)
    phrases = [" ".join(words_of(text)[:n]) for n in range(1, 6) for text in captions[::5]]
    queries = sorted({phrase for phrase in phrases if phrase} | {"unheard", "a unheard", "b b b b"})
    found = matching.Matcher(queries)(matching.normalise(pa.array(captions))).to_pylist()
    expected = [[i for i, q in enumerate(queries) if holds(text, q)] for text in captions]
    assert found == expected
    lengths = {len(queries[i].split()) for row in found for i in row}
    assert lengths == {1, 2, 3, 4, 5}
    assert any(not row for row in found)


def test_matches_begin_and_end_at_words():
    queries = ["cat", "t shirt", "new york city"]
    captions = ["category", "a CAT!", "T-shirts", "my T-Shirt", "New York", "new york, City cat"]
    found = matching.Matcher(queries)(matching.normalise(pa.array(captions))).to_pylist()
    assert found == [[], [0], [], [1], [], [0, 2]]


# ---- Sampling ----------------------------------------------------------------------------------


def test_draws_are_uniform_and_independent():
    rows, queries = (part.ravel() for part in np.meshgrid(np.arange(400), np.arange(250)))
    drawn = sampling.draws(0, "x", rows, queries)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert len(np.unique(drawn)) == len(drawn)
    histogram = np.histogram(drawn, 20, (0, 1))[0]
    assert ((histogram - 5000) ** 2 / 5000).sum() < 43.8  # chi-squared, 19 degrees, p = 0.001
    grid = drawn.reshape(250, 400)
    others = [sampling.draws(1, "x", rows, queries), sampling.draws(0, "y", rows, queries)]
    for other in (*others, np.roll(grid, 1, 0).ravel(), np.roll(grid, 1, 1).ravel()):
        assert abs(np.corrcoef(drawn, other)[0, 1]) < 0.0104  # 3.3 standard deviations


def test_draws_depend_on_nothing_else():
    order = np.random.default_rng(0).permutation(1000)
    rows, queries = np.arange(1000), np.arange(1000) % 7
    drawn = sampling.draws(3, "x", rows, queries)
    assert (sampling.draws(3, "x", rows[order], queries[order]) == drawn[order]).all()


def test_balance(tmp_path: Path):
    """The frequent query is cut to --per_query, pairs of rare ones are all kept."""
    captions = ["a dog"] * 9000 + ["a dog and a newt"] * 30 + ["an axolotl"] * 70 + ["a cat"] * 900
    (tmp_path / "pairs.txt").write_text("\n".join(captions) + "\n")
    (tmp_path / "queries.txt").write_text("dog\nNewt\naxolotl\nzebra\nnewt!\n")
    report = run(tmp_path / "pairs.txt", tmp_path / "out", "--per_query=500")
    kept = Counter(row["caption"] for row in selection(tmp_path / "out"))
    assert kept["a dog and a newt"] == 30
    assert kept["an axolotl"] == 70
    assert abs(kept["a dog"] - 500 * 9000 / 9030) < 4 * 500**0.5
    assert set(kept) == set(captions[:-1]) - {"a cat"}
    dog = kept["a dog"] + 30
    counts = pq.read_table(tmp_path / "out" / "counts.parquet").to_pydict()
    assert counts == {
        "query": ["dog", "newt", "axolotl", "zebra"],
        "count": [9030, 30, 70, 0],
        "kept": [dog, 30, 70, 0],
    }
    assert report["pairs"] == {"read": 10_000, "matched": 9100, "kept": kept.total()}
    assert report["queries"] == {"used": 4, "left_out": 1, "matched": 3, "over_per_query": 1}
    assert report["matches"] == {"before": 9130, "after": dog + 100}
    assert report["curve"][-1] == {"queries": 3, "count": 30, "before": 1.0, "after": 1.0}
    other = run(tmp_path / "pairs.txt", tmp_path / "out", "--per_query=500", "--seed=1")
    assert other["pairs"]["kept"] != 0
    rows = {row["row"] for row in selection(tmp_path / "out")}
    assert rows >= set(range(9000, 9100))
    assert rows != {row for row, text in enumerate(captions) if kept[text]}


# ---- Input -------------------------------------------------------------------------------------

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


# ---- Passes ------------------------------------------------------------------------------------


def write_shards(directory: Path, count: int, rows: int) -> None:
    """Shards of random captions, and queries of one and two words."""
    rng = np.random.default_rng(0)
    words = np.array([f"w{i}" for i in range(3000)])
    weights = 1 / np.arange(1, len(words) + 1)
    for shard in range(count):
        drawn = rng.choice(words, (rows, 4), p=weights / weights.sum())
        texts = [" ".join(row) for row in drawn.tolist()]
        pq.write_table(pa.table({"caption": texts}), directory / f"{shard:03}.parquet")
    pairs = [f"w{i} w{j}" for i in range(30) for j in range(30)]
    (directory / "queries.txt").write_text("\n".join([*words[:500].tolist(), *pairs]))


def results(output: Path) -> dict[str, bytes]:
    """All that a run leaves which is to be the same whatever the circumstances."""
    paths = [*(output / "selection").iterdir(), output / "report.json", output / "counts.parquet"]
    return {path.name: path.read_bytes() for path in paths}


def test_same_result_by_several_workers_and_after_a_kill(tmp_path: Path):
    write_shards(tmp_path, 16, 12_000)
    data = str(tmp_path / "*.parquet")
    run(data, tmp_path / "one", "--per_query=300")
    killed = tmp_path / "killed"
    options = [data, f"--queries={tmp_path}/queries.txt", "--per_query=300", "--workers=3"]
    command = [*COMMAND, *options, f"--output={killed}"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(killed.glob("matches/*.counts"))) < 2:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # workers end with their parent
    done = {path: path.stat().st_mtime_ns for path in killed.glob("matches/*.counts")}
    assert 2 <= len(done) < 16
    assert not list(killed.glob("selection/*"))
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert results(killed) == results(tmp_path / "one")
    kept = json.loads((killed / "report.json").read_text())["pairs"]
    assert kept["matched"] > kept["kept"] > 0
    assert not list(killed.glob("*/*.tmp"))


def test_only_what_changed_is_done_again(tmp_path: Path):
    write_shards(tmp_path, 3, 500)

    def run_again(*options: str) -> dict[str, int]:
        run(str(tmp_path / "0*.parquet"), tmp_path / "out", *options)
        return {
            f"{path.parent.name}/{path.name[:3]}": path.stat().st_mtime_ns
            for path in tmp_path.glob("out/*/*.counts")
        }

    first = run_again("--per_query=50")
    assert len(first) == 6
    assert run_again("--per_query=50") == first
    assert changed(first, run_again("--per_query=60")) == {f"selection/00{i}" for i in range(3)}
    second = run_again("--per_query=60")
    pq.write_table(pa.table({"caption": ["w1 w2", "w3"]}), tmp_path / "001.parquet")
    third = run_again("--per_query=60")
    assert changed(second, third) == {"matches/001", *(f"selection/00{i}" for i in range(3))}
    (tmp_path / "001.parquet").unlink()
    assert len(run_again("--per_query=60")) == 4  # a shard that is no longer asked for
    assert len(list(tmp_path.glob("out/selection/*.parquet"))) == 2


def changed(before: dict[str, int], after: dict[str, int]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def test_a_moved_data_set_keeps_its_selection(tmp_path: Path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, 2, 2000)
        run(tmp_path / name / "0*.parquet", tmp_path / name / "out", "--per_query=20")
    here, there = (selection(tmp_path / name / "out") for name in ("here", "there"))
    rows = [sorted((row["row"], row["caption"]) for row in rows) for rows in (here, there)]
    assert rows[0] == rows[1]
    assert 100 < len(rows[0]) < 4000


def test_beam(tmp_path: Path):
    pytest.importorskip("apache_beam")
    write_shards(tmp_path, 3, 500)
    run(str(tmp_path / "*.parquet"), tmp_path / "one", "--per_query=30")
    run(str(tmp_path / "*.parquet"), tmp_path / "beam", "--per_query=30", "--engine=beam")
    assert results(tmp_path / "beam") == results(tmp_path / "one")


# ---- Mistakes ----------------------------------------------------------------------------------


def test_mistakes_are_explained(tmp_path: Path):
    (tmp_path / "queries.txt").write_text("dog\n")
    (tmp_path / "x.csv").write_text("alt,url\na cat,b\n")
    shards.write_tar(tmp_path / "x.tar", shards.sample("a", "a dog"))
    for data, options, message in (
        ("none/*.csv", [], "nothing to read"),
        (
            "x.csv",
            [],
            "no column caption or text or title of captions; it has alt, url.*--text_key",
        ),
        ("x.csv", ["--text_key=alt", "--keep=size"], "no column 'size' to keep"),
        ("x.csv", ["--text_key=alt", "--keep=row"], "cannot name row"),
        ("x.csv", ["--text_key=alt"], "No caption of 1 shard.* matches a query"),
        ("x.csv", ["--text_key=alt", "--write_tars"], "--write_tars needs tar shards"),
        ("", [], r"\.csv and \.tar files"),
        ("queries.doc", [], "cannot be read"),
        ("x.tar", [f"--queries={tmp_path}/none.txt"], "no list of queries"),
        ("x.tar", [f"--queries={tmp_path}/x.tar", "--engine=none"], None),
    ):
        with pytest.raises(UserError if message else SystemExit, match=message):
            run(tmp_path / data, tmp_path / "out", *options)


def test_help_is_quick_and_shows_examples(capsys: pytest.CaptureFixture):
    for arguments in (["--help"], ["pairs", "--help"], ["queries", "--help"]):
        with contextlib.suppress(SystemExit):
            curate.main(arguments)
        assert "python -m clip_jax data curate" in capsys.readouterr().out
