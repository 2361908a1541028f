"""`data stats` against figures counted by NumPy and by hand."""

import json

import numpy as np
import pytest
from shards import write_tar
from tiny_data import encoded, picture, sample

from clip_jax.curation import cli, parallel, stats
from clip_jax.curation.stats_report import Histogram


def histogram_of(values) -> Histogram:
    made = Histogram()
    for value in values:
        made.add(value)
    return made


class TestHistogram:
    def test_exact_below_ten_thousand(self):
        values = np.random.default_rng(0).integers(0, 10_000, 777)
        first, second = histogram_of(values[:300]), histogram_of(values[300:])
        first.merge(second)
        assert len(first) == 777
        points = [0, 1, 33.3, 50, 99, 100]
        expected = np.percentile(values, points, method="inverted_cdf")
        np.testing.assert_array_equal(first.percentiles(points), expected)
        assert first.mean() == pytest.approx(values.mean())
        assert first.fraction_above(5000) == np.mean(values > 5000)

    def test_large_values_take_few_keys(self):
        values = np.random.default_rng(0).integers(10_000, 10**9, 30_000)
        made = histogram_of(values)
        assert len(made.values()[0]) < 20_000
        for point in (1, 50, 99):
            exact = np.percentile(values, point, method="inverted_cdf")
            assert made.percentiles([point])[0] == pytest.approx(exact, rel=5e-4)

    def test_histogram(self):
        middles, fractions = histogram_of([3] * 6 + [4] * 3 + [6]).bin(50)
        np.testing.assert_array_equal(middles, [3, 4, 5, 6])
        np.testing.assert_allclose(fractions, [0.6, 0.3, 0, 0.1])
        middles, fractions = histogram_of(range(1000)).bin(10)
        assert len(middles) == len(fractions) == 10
        assert fractions.sum() == pytest.approx(0.995, abs=0.005)


@pytest.fixture(autouse=True)
def few_batches(monkeypatch):
    monkeypatch.setattr(stats, "_BATCHES", 5)
    monkeypatch.setattr(stats, "_CAPTIONS", (32,))


@pytest.fixture
def shards(tmp_path):
    """20 images of different sizes, one twice; "spam" three times, once in other letters."""
    sizes = [(20 + 3 * i, 40 - i) for i in range(20)]
    files = [encoded(picture(i, size), "PNG" if i % 4 else "JPEG") for i, size in enumerate(sizes)]
    texts = [f"caption number {i}, " + "word " * 5 * i for i in range(20)]
    texts[3], texts[7], texts[9] = "spam", " SPAM\n", "&#115;pam"
    files[5] = files[2]
    members = [m for i in range(20) for m in sample(f"{i:02}", files[i], texts[i])]
    path = tmp_path / "a.tar"
    write_tar(path, [*members, *sample("bad", b"nothing", "spam")])
    sizes[5] = sizes[2]
    return path, sizes, files, texts


def run(capsys, *argv) -> str:
    cli.main(["stats", *map(str, argv)])
    return capsys.readouterr().out


@pytest.mark.parametrize("workers", [1, 2])
def test_figures(shards, tmp_path, capsys, monkeypatch, workers):
    monkeypatch.setattr(parallel, "PART", 4)
    path, sizes, files, texts = shards
    found, page = tmp_path / "found.json", tmp_path / "page.html"
    printed = run(capsys, path, f"--workers={workers}", f"--json={found}", f"--html={page}")
    summary = json.loads(found.read_text())
    assert (summary["examples"], summary["usable"], summary["captions"]) == (21, 20, 20)
    assert summary["unusable"] == {"unreadable image": 1}
    assert summary["image_bytes"] == sum(map(len, files))
    jpegs = sum(file.startswith(b"\xff\xd8") for file in files)
    assert summary["formats"] == {"PNG": 20 - jpegs, "JPEG": jpegs}
    width, height = np.array(sizes).T
    for name, values in {
        "width": width,
        "height": height,
        "pixels": width * height,
        "bytes": [len(file) for file in files],
        "characters": [len(text) for text in texts],
        "words": [len(text.split()) for text in texts],
    }.items():
        got = summary["percentiles"][name]
        for point in stats.POINTS:
            assert got[f"p{point}"] == np.percentile(values, point, method="inverted_cdf")
        assert got["mean"] == pytest.approx(np.mean(values))
    assert summary["duplicate_images"] == pytest.approx(1 / 20)
    assert summary["duplicate_captions"] == pytest.approx(2 / 20)
    assert summary["frequent_captions"] == [{"caption": "spam", "count": 3}]
    # An id per word, one for the comma, two at the ends; a number has one per digit.
    lengths = [3 if "spam" in t.lower() or "&" in t else len(t.split()) + 3 for t in texts]
    lengths = [n + (i > 9 and n > 3) for i, n in enumerate(lengths)]
    assert summary["cut_captions"] == np.mean(np.array(lengths) > 77)
    assert summary["percentiles"]["ids"]["p100"] == max(lengths)
    assert "spam" in printed
    assert "1 unreadable image" in printed
    html = page.read_text()
    assert html.count("<svg") >= 6
    assert "spam" in html
    assert "http://" not in html.replace("http://www.w3.org", "")


def test_sample(shards, tmp_path, capsys):
    found = tmp_path / "found.json"
    run(capsys, shards[0], "--workers=1", "--sample=8", f"--json={found}")
    summary = json.loads(found.read_text())
    assert (summary["examples"], summary["seen"]) == (21, 8)
    assert 7 <= summary["usable"] <= 8
    drawn = [stats.choose(1000, 30, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 30
    assert drawn[0] == sorted(drawn[0])
    assert stats.choose(10, 10, 0) == range(10)


def test_no_usable_example(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", sample("0", b"nothing", "a caption"))
    with pytest.raises(SystemExit):
        cli.main(["stats", str(tmp_path), "--workers=1"])
    assert "1 unreadable image" in capsys.readouterr().err


def first_fit(lengths: list[int], row: int) -> int:
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        for i, used in enumerate(rows):
            if used + length <= row:
                rows[i] += length
                break
        else:
            rows.append(length)
    return len(rows)


def test_rows_against_first_fit_by_hand():
    ids = np.random.default_rng(0).integers(3, 78, (6, 40)).astype(np.int32)
    for row in (80, 128):
        expected = [first_fit(batch.tolist(), row) for batch in ids]
        np.testing.assert_array_equal(stats.rows_used(ids, 77, row), expected)


def test_suggested_rows():
    suggested = stats.suggest_rows(histogram_of([40] * 100), 77)
    assert suggested[0] == {"captions": 32, "80": 0.5, "128": 0.35}  # 11 rows of 32 captions
    long = stats.suggest_rows(histogram_of([500] * 100), 100)
    assert long[0] == {"captions": 32, "128": 1.0}
