"""python -m clip_jax embed: embeddings against the module itself, restarts, hosts, user errors."""

import csv
import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import several_hosts
import tiny
import tiny_run
from several_hosts import endings, launch
from shards import write_tar
from tiny_data import encoded, picture, sample

import clip_jax
from clip_jax import api
from clip_jax.embed import cli as embed
from clip_jax.embed import inputs
from clip_jax.embed.encoder import Encoder
from clip_jax.embed.reader import Row
from clip_jax.embed.store import Store, open_store
from clip_jax.models import buckets

ROOT = pathlib.Path(__file__).parents[2]
SIDE, WIDTH = 16, 16  # of the model
TEXTS = ["a seven", "the digit 3", "a seven to the left of the digit three", "two", "a b c d e f g"]


@functools.cache
def model() -> api.Model:
    return clip_jax.load(tiny_run.finished())


def run(data, out: pathlib.Path, *options: str) -> Store:
    run_ = tiny_run.finished()
    with tiny_run.compile_once():
        embed.main([f"--model={run_}", str(data), f"--out={out}", "--batch_size=8", *options])
    return open_store(out)


def table(store: Store) -> list[dict]:
    """Reads all parts by a plain Parquet reader."""
    found = sorted(store.directory.glob("part-*.parquet"))
    return [row for path in found for row in pq.read_table(path).to_pylist()]


def image_embeds(seeds) -> np.ndarray:
    """Embeds pictures by Pillow and the module, one by one."""
    pixels = []
    for seed in seeds:
        image = picture(seed)  # 40 x 30
        resized = image.resize((21, SIDE), 3)  # 16 * 40 // 30
        pixels.append(np.asarray(resized)[:, 2 : 2 + SIDE])
    embeds = model().net.apply(model().variables, np.stack(pixels), method="encode_image")
    return np.asarray(embeds)


def text_embeds(texts: list[str]) -> np.ndarray:
    tokens = clip_jax.tokenize(texts, context_length=24, truncate=True)
    return np.asarray(model().net.apply(model().variables, tokens, method="encode_text"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> pathlib.Path:
    """Eleven images at different depths, one of them damaged, one with a text."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "inner").mkdir()
    for seed in range(10):
        place = folder / "inner" if seed % 2 else folder
        (place / f"{seed}.png").write_bytes(encoded(picture(seed)))
    (folder / "broken.png").write_bytes(encoded(picture(0))[:60])
    (folder / "4.txt").write_text("the fourth")
    (folder / ".hidden.png").write_bytes(encoded(picture(0)))
    return folder


def test_a_plain_folder(pictures, tmp_path):
    store = run(pictures, tmp_path / "out", "--dtype=float32", "--rows=4")
    rows = table(store)
    seeds = [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
    assert [row["key"] for row in rows] == [
        f"inner/{seed}.png" if seed % 2 else f"{seed}.png" for seed in seeds
    ]
    assert [row["captions"] for row in rows] == [[], [], ["the fourth"], *7 * [[]]]
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    found = np.array([row["image_embed"] for row in rows], np.float32)
    np.testing.assert_allclose(found, image_embeds(seeds), atol=2e-6)
    (bad,) = map(json.loads, (store.directory / "skipped.jsonl").read_text().splitlines())
    assert (bad["index"], bad["key"], bad["reason"]) == (5, "broken.png", "unreadable image")
    assert [path.name for path in sorted(store.directory.glob("part*"))] == [
        f"part-0000{part}-of-00003.parquet" for part in range(3)
    ]


def test_shards_both_towers_as_npy(tmp_path):
    samples = [sample(f"{i}", encoded(picture(i)), TEXTS[i]) for i in range(5)]
    samples.insert(3, sample("blank", encoded(picture(9)), "&nbsp;"))
    write_tar(tmp_path / "a.tar", [file for files in samples for file in files])
    store = run(tmp_path / "*.tar", tmp_path / "out", "--of=both", "--format=npy")
    rows = table(store)
    assert [row["captions"] for row in rows] == [[text] for text in TEXTS]
    assert set(rows[0]) == {"index", "key", "captions", "labels", "groups"}
    for column, wanted in (("image_embed", image_embeds(range(5))), ("text_embed", None)):
        wanted = text_embeds(TEXTS) if wanted is None else wanted
        array = np.load(tmp_path / "out" / f"part-00000-of-00001.{column}.npy")
        assert array.dtype == np.float16
        np.testing.assert_allclose(array, wanted, atol=1e-3)
        np.testing.assert_array_equal(np.concatenate(list(store.blocks(column))), array)
    assert "empty caption" in (tmp_path / "out" / "skipped.jsonl").read_text()


def test_features_are_the_input_of_the_projection(pictures, tmp_path):
    rows = table(run(pictures, tmp_path / "out", "--dtype=float32", "--of=features"))
    embeds, features = (
        np.array([row[name] for row in rows], np.float32)
        for name in ("image_embed", "image_features")
    )
    projected = features @ np.asarray(model().variables["params"]["image"]["projection"]["kernel"])
    unit = projected / np.linalg.norm(projected, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, embeds, atol=2e-6)
    assert features.shape[1] == 32  # the model's width, twice that of its embeddings


@pytest.mark.parametrize("suffix", ["txt", "csv", "jsonl"])
@pytest.mark.slow
def test_caption_files(suffix, tmp_path):
    path = tmp_path / f"captions.{suffix}"
    texts = [*TEXTS, "seven " * 40]
    keys = [str(i) for i in range(6)] if suffix == "txt" else [f"k{i}" for i in range(6)]
    with path.open("w") as file:
        if suffix == "txt":
            file.write("\n".join(texts) + "\n\n")
        elif suffix == "csv":
            csv.writer(file).writerows([("key", "title"), *zip(keys, texts)])
        else:
            file.writelines(
                json.dumps({"id": key, "caption": text}) + "\n" for key, text in zip(keys, texts)
            )
    rows = table(run(path, tmp_path / "out", "--dtype=float32"))
    assert [row["key"] for row in rows] == keys
    found = np.array([row["text_embed"] for row in rows], np.float32)
    np.testing.assert_allclose(found, text_embeds(texts), atol=2e-6)


def test_class_folders_have_labels(tmp_path):
    for seed, name in enumerate(("cat", "dog", "cat")):
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name / f"{seed}.png").write_bytes(encoded(picture(seed)))
    rows = table(run(tmp_path / "data", tmp_path / "out"))
    assert [(row["key"], row["labels"]) for row in rows] == [
        ("cat/0.png", [0]),
        ("cat/2.png", [0]),
        ("dog/1.png", [1]),
    ]


def test_everything_known_of_an_example_is_kept(tmp_path):
    (tmp_path / "data").mkdir()
    for seed in range(2):
        (tmp_path / "data" / f"{seed}.png").write_bytes(encoded(picture(seed)))
    table_ = "image,caption,alt,kind,age,sex\n0.png,one,uno,b;a,20-29,f\n1.png,two,,,70+,\n"
    (tmp_path / "data" / "captions.csv").write_text(table_)
    keys = ["--text_key=caption,alt", "--label_key=kind", "--group_keys=sex,age"]
    store = run(tmp_path / "data", tmp_path / "out", *keys)
    assert store.rows([1, 0]) == [
        Row(1, "1.png", ["two"], [], ["", "70+"]),
        Row(0, "0.png", ["one", "uno"], [1, 0], ["f", "20-29"]),
    ]


def test_a_restart_makes_only_what_is_missing(pictures, whole, tmp_path):
    shutil.copytree(whole.directory, tmp_path / "cut")
    cut = Store(tmp_path / "cut", whole.manifest)
    for name in (cut.path(1), cut.directory / "skipped.jsonl"):
        name.unlink()
    before = written(cut, 0, 2)
    again = run(pictures, tmp_path / "cut", "--rows=4")
    assert written(again, 0, 2) == before
    assert table(again) == table(whole)
    assert len((cut.directory / "skipped.jsonl").read_text().splitlines()) == 1
    assert not list(cut.directory.glob("*.tmp"))


def written(store: Store, *parts: int) -> list[int]:
    """Returns when parts were written, in nanoseconds."""
    return [os.stat(store.path(part)).st_mtime_ns for part in parts]


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory) -> Store:
    return run(pictures, tmp_path_factory.mktemp("whole"), "--rows=4")


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("pictures", ["--rows=5"], r"part_rows 4, not 5.*another --out"),
        ("pictures", ["--dtype=float32", "--rows=4"], "dtype 'float16', not 'float32'"),
        ("nowhere", [], "neither a directory"),
        ("empty", [], "no image in the directory"),
        ("nowhere.csv", [], "no file"),
        ("nothing.txt", [], "no text"),
        ("pictures", ["--process=2", "--processes=2"], "numbered from 0 to 1"),
    ],
)
def test_user_errors(data, options, message, pictures, whole, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.txt").write_text("\n\n")
    place = pictures if data == "pictures" else tmp_path / data
    with pytest.raises(SystemExit) as stopped:
        run(place, whole.directory, *options)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_another_model_does_not_resume(pictures, whole, capsys):
    earlier = f"{tiny_run.finished()}/checkpoints/8"
    with pytest.raises(SystemExit):
        run(pictures, whole.directory, "--rows=4", f"--model={earlier}")
    message = capsys.readouterr().err
    assert "parameters" in message
    assert "part_rows" not in message


@pytest.mark.slow
def test_hosts_share_the_parts(pictures, tmp_path):
    """Two processes of two devices each, joined by a coordinator."""
    command = ["-m", "clip_jax", "embed", f"--model={tiny_run.finished()}", str(pictures)]
    command += [f"--out={tmp_path / 'out'}", "--rows=3", "--batch_size=4"]
    hosts = [launch([*command, *flags], 2, quick="") for flags in several_hosts.flags(2)]
    ended = endings(hosts)
    errors = [each.stderr for each in ended]
    assert [each.returncode for each in ended] == [0, 0], errors
    assert all("6/6" in error or "5/5" in error for error in errors)  # examples of each host
    alone = table(run(pictures, tmp_path / "alone", "--rows=3"))
    for row, wanted in zip(table(open_store(tmp_path / "out")), alone, strict=True):
        assert row["key"] == wanted["key"]
        np.testing.assert_allclose(row["image_embed"], wanted["image_embed"], atol=1e-3)


def test_picture_root():
    assert inputs.picture_root("digits:test") == ""
    assert inputs.picture_root(str(ROOT / "tests")) == str(ROOT / "tests")


# ---- Texts in batches of like length -----------------------------------------------------------


def test_buckets_cover_every_text_once():
    net = tiny.make_net("vit")
    tokens = tiny.make_batch(net)["tokens"]
    seen = []
    for rows, batch in buckets.batches(tokens, net.size, 5):
        assert batch.shape == (5, 8)
        np.testing.assert_array_equal(batch[: len(rows)], tokens[rows])
        assert not batch[len(rows) :].any()
        seen += rows.tolist()
    assert sorted(seen) == list(range(tiny.BATCH))


@pytest.mark.slow
def test_buckets_change_nothing():
    """Texts of 3 to 24 ids, in any order, against whole rows."""
    rng = np.random.default_rng(0)
    texts = [" ".join(["seven"] * count) for count in rng.permutation(np.arange(1, 23))]
    small = api.Model(model().net, model().variables, model().tokenizer, batch_size=4)
    np.testing.assert_allclose(small.encode_text(texts), text_embeds(texts), atol=2e-6)
    assert small._text._cache_size() == 3  # lengths 8, 16 and 24
    shapes = [
        batch.shape for _, batch in buckets.batches(small.tokenizer(texts), small.net.size, 4)
    ]
    assert shapes == [(4, 8), (4, 16), (4, 16), (4, 24), (4, 24), (4, 24)]
    encoder = Encoder(small.net, tiny.make_mesh(1), 4, threads=1)  # as the command has it
    tokens = small.tokenizer(texts)
    found = encoder.texts(small.variables, tokens, by_length=True)
    np.testing.assert_allclose(found, encoder.texts(small.variables, tokens), atol=2e-6)
    assert encoder._text._cache_size() == 3


def test_towers_that_read_the_last_token_get_whole_rows():
    net = tiny.make_net("vit")
    tokens = tiny.make_batch(net)["tokens"]
    wide = np.pad(tokens, ((0, 0), (0, 8)))
    lengths = {
        causal: {b.shape[1] for _, b in buckets.batches(wide, size, 4)}
        for causal, size in (
            (True, net.size),
            (False, dataclasses.replace(net.size, text_causal=False)),
        )
    }
    assert lengths == {True: {8}, False: {16}}
    assert jax.device_count() == 8
