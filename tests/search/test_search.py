"""Exact and approximate search against a sort of all products in NumPy, and the command."""

import functools
import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_run
from tiny_data import encoded, picture

import clip_jax
from clip_jax import sharding
from clip_jax.embed import cli as embed
from clip_jax.embed.reader import Row
from clip_jax.embed.store import Manifest, Store, open_store
from clip_jax.errors import UserError
from clip_jax.search import approximate, exact
from clip_jax.search import cli as search
from clip_jax.search.searcher import Searcher


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    values = rng.standard_normal(shape).astype(np.float32)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def by_sorting(rows: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores and numbers of the best k, in float64."""
    scores = queries.astype(np.float64) @ rows.astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


def put(rows: np.ndarray, size: int, mesh) -> list[exact.Block]:
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return list(exact.put_blocks(parts, size, mesh))


# ---- Exact -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("devices", "dtype"), [(1, np.float32), (8, np.float32), (8, np.float16)])
def test_exact_search_equals_a_sort(devices, dtype, monkeypatch):
    monkeypatch.setattr(exact, "_QUERIES", 16)  # so that there are several tiles
    rng = np.random.default_rng(0)
    rows, queries = unit(rng, 1003, 24).astype(dtype), unit(rng, 37, 24)
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    best = exact.search(put(rows, 100, mesh), queries, 7, mesh)
    scores, numbers = by_sorting(rows, queries, 7)
    np.testing.assert_array_equal(best.rows, numbers)
    np.testing.assert_allclose(best.scores, scores, atol=1e-6)


def test_more_results_than_rows_of_a_device(mesh8):
    rng = np.random.default_rng(1)
    rows, queries = unit(rng, 90, 8), unit(rng, 3, 8)
    best = exact.search(put(rows, 16, mesh8), queries, 40, mesh8)
    np.testing.assert_array_equal(best.rows, by_sorting(rows, queries, 40)[1])


def test_fewer_rows_than_results(mesh8):
    rng = np.random.default_rng(2)
    rows, queries = unit(rng, 5, 8), unit(rng, 2, 8)
    best = exact.search(put(rows, 16, mesh8), queries, 9, mesh8)
    np.testing.assert_array_equal(best.rows[:, :5], by_sorting(rows, queries, 5)[1])
    assert (best.rows[:, 5:] == -1).all()
    assert (best.scores[:, 5:] == -np.inf).all()
    assert exact.search([], queries[:0], 9, mesh8).rows.shape == (0, 9)


def test_of_equal_rows_the_first_come_first(mesh8):
    rows = np.tile(unit(np.random.default_rng(3), 1, 8), (50, 1))
    best = exact.search(put(rows, 16, mesh8), rows[:1], 50, mesh8)
    np.testing.assert_array_equal(best.rows[0], np.arange(50))


def test_a_search_compiles_once(mesh8):
    rng = np.random.default_rng(4)
    program = exact._program(mesh8)
    program.clear_cache()
    exact.search(put(unit(rng, 333, 8), 32, mesh8), unit(rng, 2500, 8), 3, mesh8)
    assert program._cache_size() == 1


# ---- A store of known embeddings ---------------------------------------------------------------


def make_store(directory: pathlib.Path, embeds: np.ndarray, part: int, **fields) -> Store:
    """Rows named by their numbers; every tenth example is unusable."""
    numbers = [n for n in range(len(embeds) * 10 // 9 + 1) if n % 10 != 9][: len(embeds)]
    settings = {
        "data": {"data": "nowhere"},
        "examples": numbers[-1] + 1,
        "columns": {"image_embed": embeds.shape[1]},
        "dtype": "float32",
        "format": "parquet",
        "part_rows": part,
        "model": "none",
        "parameters": "none",
    }
    store = Store(directory, Manifest(**settings | fields))
    store.begin()
    for i in range(store.manifest.parts):
        first, stop = store.range(i)
        inside = [at for at, n in enumerate(numbers) if first <= n < stop]
        rows = [
            Row(numbers[at], f"key{numbers[at]}", [f"of {at}", "again"], [at % 3], [])
            for at in inside
        ]
        store.write(i, rows, {"image_embed": embeds[inside]}, {})
    return open_store(directory)


@pytest.mark.parametrize("format_", ["parquet", "npy"])
def test_a_store_gives_back_what_was_written(format_, tmp_path):
    embeds = unit(np.random.default_rng(5), 250, 12)
    store = make_store(tmp_path, embeds, 100, format=format_)
    np.testing.assert_array_equal(np.concatenate(list(store.blocks("image_embed"))), embeds)
    assert sum(store.counts()) == 250
    rows = store.rows([249, 0, 90, 89, 0])
    assert [row.key for row in rows] == ["key276", "key0", "key100", "key98", "key0"]
    assert rows[0] == Row(276, "key276", ["of 249", "again"], [0], [])
    assert rows[0].caption == "of 249"
    assert Row(0, "", [], [], []).caption == ""


def test_the_index_finds_what_exact_search_finds(tmp_path, mesh8):
    """Recall of the best 10 among clusters, as embeddings of images are."""
    rng = np.random.default_rng(6)
    centres = unit(rng, 60, 64)
    noisy = centres[rng.integers(0, 60, 6000)] + 0.6 * unit(rng, 6000, 64)
    rows = noisy / np.linalg.norm(noisy, axis=1, keepdims=True)
    queries = unit(rng, 100, 64) * 0.5 + centres[rng.integers(0, 60, 100)]
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    store = make_store(tmp_path, rows, 2000)
    wanted = exact.search(put(rows, 1000, mesh8), queries, 10, mesh8)
    found = approximate.Index(store, "image_embed").search(queries, 10)
    shared = [len(set(a) & set(b)) for a, b in zip(found.rows.tolist(), wanted.rows.tolist())]
    assert np.mean(shared) / 10 > 0.95
    both = found.rows == wanted.rows
    np.testing.assert_allclose(found.scores[both], wanted.scores[both], atol=2e-3)  # float16
    (path,) = tmp_path.glob("*.usearch")
    before = path.stat().st_mtime_ns
    again = approximate.Index(store, "image_embed").search(queries, 10)
    assert path.stat().st_mtime_ns == before  # opened, not built
    np.testing.assert_array_equal(again.rows, found.rows)


# ---- The command -------------------------------------------------------------------------------


@functools.cache
def embedded() -> tuple[pathlib.Path, pathlib.Path]:
    """A folder of 30 pictures, and their embeddings."""
    folder = tiny_run.folder() / "searched"
    (folder / "pictures").mkdir(parents=True)
    for seed in range(30):
        (folder / "pictures" / f"{seed}.png").write_bytes(encoded(picture(seed)))
    options = [f"--model={tiny_run.finished()}", str(folder / "pictures"), "--dtype=float32"]
    with tiny_run.compile_once():
        embed.main([*options, f"--out={folder / 'out'}", "--rows=7", "--batch_size=8"])
    return folder / "pictures", folder / "out"


def command(*options: str) -> None:
    out = embedded()[1]
    with tiny_run.compile_once():
        search.main([f"--model={tiny_run.finished()}", f"--embeddings={out}", *options])


def test_search_by_text(capsys):
    folder, _ = embedded()
    capsys.readouterr()
    command("a seven", "a three", "--top=3", "--json")
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model = clip_jax.load(tiny_run.finished())
    files = sorted(folder.glob("*.png"))
    scores, order = by_sorting(
        model.encode_image(files), model.encode_text(["a seven", "a three"]), 3
    )
    assert [record["path"] for record in records] == [str(files[i]) for i in order.ravel()]
    assert [record["query"] for record in records] == 3 * ["a seven"] + 3 * ["a three"]
    np.testing.assert_allclose([r["score"] for r in records], scores.ravel(), atol=1e-5)


@pytest.mark.parametrize("options", [[], ["--index"]])
def test_search_by_picture_finds_itself_first(options, capsys):
    folder, _ = embedded()
    capsys.readouterr()
    command(f"--image={folder / '17.png'}", "--top=2", *options)
    title, header, first, _ = capsys.readouterr().out.strip().splitlines()
    assert title == str(folder / "17.png")
    assert header.split() == ["score", "key", "path"]
    assert first.split() == ["1.000", "17.png", str(folder / "17.png")]


def test_help_is_quick():
    """--help imports nothing heavy."""
    for name in ("embed", "search"):
        code = (
            "import sys; from clip_jax import __main__\n"
            f"try: __main__.main(['{name}', '--help'])\n"
            "except SystemExit: sys.exit('jax' in sys.modules or 'tensorflow' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert f"usage: python -m clip_jax {name}" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--embeddings=nowhere", "a"], "no embeddings in nowhere.*python -m clip_jax embed"),
        (["--column=text_embed", "a"], "no column text_embed, but image_embed"),
        (["--image=nowhere.png"], "nowhere.png"),
        (["a", "--serve"], "or --serve"),
        ([], "or --serve"),
    ],
)
def test_user_errors(options, message, capsys):
    embedded()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command(*options)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_parts_that_are_missing_and_other_models_are_named(tmp_path):
    store = make_store(tmp_path, unit(np.random.default_rng(7), 50, 16), 20)
    with pytest.raises(UserError, match="another model"):
        Searcher(clip_jax.load(tiny_run.finished()), store, "", False)
    store.path(1).unlink()
    with pytest.raises(UserError, match=r"1 of 3 parts.*part-00001-of-00003"):
        open_store(tmp_path)
