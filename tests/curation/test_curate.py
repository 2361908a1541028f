"""Curation: exact matches, balanced samples, one result however it was come by."""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shards
from curated import run, selection

from clip_jax.curation import balancing, store
from clip_jax.curation.balancing import engines, matching, pairs, sampling
from clip_jax.errors import UserError

COMMAND = [sys.executable, "-m", "clip_jax", "data", "curate", "pairs"]
ROOT = Path(__file__).parents[2]


def words_of(text: str) -> list[str]:
    """Independent of pyarrow."""
    text = unicodedata.normalize("NFKC", text).lower()
    return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text).split()


def some_captions(count: int, seed: int) -> list[str]:
    """Few words, so that they repeat; each may carry capitals, accents and punctuation."""
    rng = random.Random(seed)
    words = ["a", "B", "c", "dé", "Éf", "ｇ", "h9", "ab", "a-b", "it's", "²", "日本"]
    glue = [" ", "  ", ", ", "-", "… ", " & "]
    return [
        "".join(rng.choice(words) + rng.choice(glue) for _ in range(rng.randrange(12)))
        for _ in range(count)
    ]


# ---- Matching ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*some_captions(50, 1), "", "!?", "ÎLE\u3000x", "a\u00adb"])
def test_normalise(text: str):
    assert matching.normalise(pa.array([text]))[0].as_py().split() == words_of(text)


def test_matches_are_those_of_brute_force():
    captions = some_captions(800, seed=2)
    phrases = [" ".join(words_of(text)[:n]) for n in range(1, 6) for text in captions[::8]]
    queries = sorted({phrase for phrase in phrases if phrase} | {"unheard", "a unheard", "b b b b"})
    found = matching.Matcher(queries)(matching.normalise(pa.array(captions))).to_pylist()
    spaced = [f" {' '.join(words_of(text))} " for text in captions]
    expected = [[i for i, q in enumerate(queries) if f" {q} " in text] for text in spaced]
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
    write_shards(tmp_path, 12, 12_000)
    data = str(tmp_path / "*.parquet")
    run(data, tmp_path / "one", "--per_query=300")
    killed = tmp_path / "killed"
    options = [data, f"--queries={tmp_path}/queries.txt", "--per_query=300", "--workers=3"]
    command = [*COMMAND, *options, f"--out={killed}"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(killed.glob("matches/*.counts"))) < 2:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # workers end with their parent
    done = {path: path.stat().st_mtime_ns for path in killed.glob("matches/*.counts")}
    assert 2 <= len(done) < 12
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


def test_shards_that_could_not_be_read_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "queries.txt").write_text("dog\n")
    for name in ("a.txt", "b.csv"):
        (tmp_path / name).write_text("caption\na dog\n")

    def fail(*_):
        raise OSError("connection reset")
        yield

    data = f"{tmp_path}/a.txt,{tmp_path}/b.csv"
    with monkeypatch.context() as patch:
        patch.setitem(pairs.READERS, ".txt", fail)
        report = run(data, tmp_path / "out")
    assert (report["skipped"], report["pairs"]["kept"]) == ({"damaged shard": 1}, 1)
    report = run(data, tmp_path / "out")
    assert (report["skipped"], report["pairs"]["kept"]) == ({}, 2)


def test_an_interrupted_change_is_not_taken_for_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_shards(tmp_path, 2, 300)
    data, queries = tmp_path / "0*.parquet", tmp_path / "queries.txt"
    run(data, tmp_path / "out")
    expected, terms = results(tmp_path / "out"), queries.read_text()
    for number in (0, 1):  # interrupted in either pass
        written = itertools.count()
        write = store.DoneMarkers.write

        def interrupted(*arguments, limit=2 * number, written=written, write=write):
            if next(written) >= limit:
                raise KeyboardInterrupt
            write(*arguments)

        queries.write_text("w1\nw2\n")
        with monkeypatch.context() as patch:
            patch.setattr(store.DoneMarkers, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(data, tmp_path / "out")
        queries.write_text(terms)
        run(data, tmp_path / "out")
        assert results(tmp_path / "out") == expected


def die(shard: str) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def test_a_killed_worker_is_explained():
    with pytest.raises(UserError, match="killed, most likely for lack of memory"):
        engines.Local(2)(die, ["a", "b"], "test")


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
        ("", [], r"\.csv and \.tar and \.txt files"),
        ("queries.doc", [], "cannot be read"),
        ("x.tar", [f"--queries={tmp_path}/none.txt"], "no list of queries"),
        ("x.tar", [f"--queries={tmp_path}/x.tar", "--engine=none"], None),
    ):
        with pytest.raises(UserError if message else SystemExit, match=message):
            run(tmp_path / data, tmp_path / "out", *options)


def test_help_is_quick_and_shows_examples(capsys: pytest.CaptureFixture):
    for arguments in (["--help"], ["pairs", "--help"], ["queries", "--help"]):
        with contextlib.suppress(SystemExit):
            balancing.main(arguments)
        assert "python -m clip_jax data curate" in capsys.readouterr().out
