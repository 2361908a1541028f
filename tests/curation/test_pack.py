"""`data pack`: what is read back from the shards is what the source holds."""

import csv
import io
import json
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from shards import write_tar
from tiny_data import encoded, picture, sample

from clip_jax.configs import default
from clip_jax.curation import cli, pack
from clip_jax.data.sources import opening
from clip_jax.data.sources.tar import TarShards
from clip_jax.errors import UserError


def run(*argv) -> None:
    cli.main(["pack", *map(str, argv)])


def fail(*argv) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*argv)
    assert ended.value.code == 2


def contents(source) -> list[tuple]:
    examples = [source[i] for i in range(len(source))]
    return [(example.image, example.captions.texts, example.label) for example in examples]


@pytest.fixture
def folder(tmp_path):
    """Ten images of four formats with captions in a table; three cannot be used."""
    root = tmp_path / "folder"
    root.mkdir()
    formats = ("JPEG", "PNG", "WEBP", "GIF")
    rows = [["image", "caption", "kind"]]
    for i in range(10):
        name = f"{i}.{formats[i % 4].lower()}"
        (root / name).write_bytes(encoded(picture(i), formats[i % 4]))
        rows.append([name, f"número {i}\n", "cat" if i % 3 else "a dog"])
    (root / "4.jpeg").write_bytes(b"<html>")
    (root / "5.png").unlink()
    rows[7][1] = "&nbsp;"
    with (root / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root


USABLE = [0, 1, 2, 3, 7, 8, 9]


@pytest.mark.parametrize("workers", [1, 2])
def test_folder(folder, tmp_path, capsys, workers):
    output = tmp_path / "shards"
    run(folder, output, "--shard_size=4", f"--workers={workers}")
    assert sorted(path.name for path in output.iterdir()) == [
        "00000.tar", "00001.tar", "00002.tar", "pack.json"
    ]  # fmt: skip
    before = opening.create(default.source(type="folder", path=str(folder)), 16, 0)
    after = TarShards(str(output))
    assert contents(after) == [(before[i].image, before[i].captions.texts, -1) for i in USABLE]
    assert [after[i].key for i in range(5)] == [
        "00000.tar/000000000", "00000.tar/000000001", "00000.tar/000000002", "00000.tar/000000003",
        "00001.tar/000000007",
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "7 examples written; 3 shards." in printed
    for reason in ("1 HTML instead of an image", "1 missing image", "1 empty caption"):
        assert reason in printed
    with tarfile.open(output / "00000.tar") as tar:
        assert [name.rpartition(".")[2] for name in tar.getnames()[::2]] == [
            "jpg", "png", "webp", "gif"
        ]  # fmt: skip


def test_classes(folder, tmp_path):
    output = tmp_path / "shards"
    run(folder, output, "--label_key=kind", "--workers=1")
    source = TarShards(str(output), label_key="label")
    assert [source[i].label for i in range(7)] == [0 if i % 3 == 0 else 1 for i in USABLE]
    assert source[0].captions.texts == ("número 0\n",)
    source = TarShards(str(output), label_key="class")
    assert source.class_names == ("a dog", "cat")


def test_several_captions_and_pixels(tmp_path):
    images = [encoded(picture(i), "JPEG") for i in range(4)]
    texts = [["one", "zwei"], "three", ["four"], ["five", "six", "seven"]]
    members = [
        m
        for i in range(4)
        for m in [
            (f"{i}.jpg", images[i]),
            (f"{i}.json", json.dumps({"caption": texts[i]}).encode()),
        ]
    ]
    write_tar(tmp_path / "a.tar", members)
    run(tmp_path / "a.tar", tmp_path / "out", "--workers=1")
    before, after = TarShards(str(tmp_path / "a.tar")), TarShards(str(tmp_path / "out"))
    assert contents(before) == contents(after)
    assert [after[i].captions.weights for i in range(4)] == [
        before[i].captions.weights for i in range(4)
    ]
    run("digits:test", tmp_path / "digits", "--workers=1", "--shard_size=200")
    digits = opening.create(default.source(type="digits", split="test"), 64, 0)
    after = TarShards(str(tmp_path / "digits"), label_key="label")
    assert len(after) == len(digits) == 360
    for i in range(0, 360, 50):
        pixels = np.asarray(Image.open(io.BytesIO(after[i].image)))
        np.testing.assert_array_equal(pixels, digits[i].image)
        assert (after[i].label, after[i].text) == (digits[i].label, digits[i].text)


def test_tfds(tmp_path):
    """Encoded images are copied, and all captions and the class stay."""
    examples = [
        (
            i,
            {
                "image": np.asarray(picture(i)),
                "text": [f"one {i}", f"two {i}"],
                "label": [0, 1][: i % 3],
            },
        )
        for i in range(5)
    ]
    tfds.dataset_builders.store_as_tfds_dataset(
        name="tiny_pairs",
        version="1.0.0",
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(encoding_format="png"),
                "text": tfds.features.Sequence(tfds.features.Text()),
                "label": tfds.features.Sequence(tfds.features.ClassLabel(names=["z", "a"])),
            }
        ),
        split_datasets={"train": examples},
        data_dir=tmp_path,
        file_format="tfrecord",
        disable_shuffling=True,
    )
    names = (f"--data_dir={tmp_path}", "--label_key=label", "--workers=1")
    run("tfds:tiny_pairs", tmp_path / "out", *names)
    source = TarShards(str(tmp_path / "out"), label_key="label")
    assert [source[i].captions.texts for i in range(5)] == [
        (f"one {i}", f"two {i}") for i in range(5)
    ]
    assert [source[i].labels for i in range(5)] == [(), (0,), (0, 1), (), (0,)]
    named = TarShards(str(tmp_path / "out"), label_key="class")
    assert [named[i].labels for i in range(5)] == [(), (1,), (1, 0), (), (1,)]
    for i in range(5):
        pixels = np.asarray(Image.open(io.BytesIO(source[i].image)))
        np.testing.assert_array_equal(pixels, picture(i))
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        record = json.load(tar.extractfile("000000001.json"))
    assert (record["label"], record["class"]) == (0, "z")
    assert record["key"].endswith("train 1")


def shards_of(path, count: int, **size) -> None:
    files = [encoded(picture(i, **size), "JPEG") for i in range(count)]
    write_tar(path, [m for i in range(count) for m in sample(f"{i:02}", files[i], f"caption {i}")])


def test_shuffled(tmp_path):
    shards_of(tmp_path / "a.tar", 30)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        argv = ("--shuffle", f"--seed={seed}", "--workers=1", "--shard_size=10")
        run(tmp_path / "a.tar", tmp_path / name, *argv)
    texts = [[t for _, (t,), _ in contents(TarShards(str(tmp_path / n)))] for n in "abc"]
    assert texts[0] == texts[1] != texts[2]
    assert sorted(texts[0]) == sorted(texts[2]) == sorted(f"caption {i}" for i in range(30))
    assert texts[0] != sorted(texts[0])
    assert (tmp_path / "a" / "00002.tar").read_bytes() == (
        tmp_path / "b" / "00002.tar"
    ).read_bytes()


def test_resize(tmp_path):
    shards_of(tmp_path / "large.tar", 2, size=(300, 200))
    shards_of(tmp_path / "small.tar", 2, size=(90, 64))
    for name in ("large", "small"):
        run(tmp_path / f"{name}.tar", tmp_path / name, "--resize=64", "--workers=1")
    large, small = (TarShards(str(tmp_path / name)) for name in ("large", "small"))
    image = Image.open(io.BytesIO(large[0].image))
    assert (image.format, image.size) == ("JPEG", (96, 64))
    expected = np.asarray(picture(0, (96, 64)), float)
    assert np.abs(np.asarray(image, float) - expected).mean() < 3
    assert small[0].image == encoded(picture(0, (90, 64)), "JPEG")


def test_restart(tmp_path, monkeypatch, capsys):
    shards_of(tmp_path / "a.tar", 10)
    output = tmp_path / "out"
    command = (tmp_path / "a.tar", output, "--shard_size=4", "--workers=1")
    tried = []

    def breaks(plan, example, class_names):
        if len(tried) == 6:
            raise OSError("No space left on device")
        tried.append(example.key)
        return real(plan, example, class_names)

    real = pack._members
    monkeypatch.setattr(pack, "_members", breaks)
    fail(*command)
    assert "No space left" in capsys.readouterr().err
    assert sorted(path.name for path in output.iterdir()) == ["00000.tar", "pack.json"]
    first = (output / "00000.tar").stat()
    monkeypatch.setattr(pack, "_members", real)
    run(*command)
    assert "6 examples written; 3 shards (1 were there already)." in capsys.readouterr().out
    assert (output / "00000.tar").stat() == first
    assert len(TarShards(str(output))) == 10
    fail(*command[:2], "--shard_size=5", "--workers=1")
    assert "shard_size differ" in capsys.readouterr().err
    fail(tmp_path / "a.tar", tmp_path)
    assert "holds other shards" in capsys.readouterr().err


def test_keep(tmp_path, capsys):
    shards_of(tmp_path / "a.tar", 10)
    (tmp_path / "keep.txt").write_text("a.tar/03\na.tar/07\na.tar/99\n")
    run(tmp_path / "a.tar", tmp_path / "out", f"--keep={tmp_path / 'keep.txt'}", "--workers=1")
    texts = [texts for _, texts, _ in contents(TarShards(str(tmp_path / "out")))]
    assert texts == [("caption 3",), ("caption 7",)]
    assert "8 not in --keep" in capsys.readouterr().out
    fail(tmp_path / "a.tar", tmp_path / "other", "--keep=absent", "--workers=1")


def test_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match="name the fields alone"):
        pack.main(["digits:test", str(tmp_path), "--text_key=a:0.3,b:0.7"])
