"""Every source against files written by hand in the test."""

import io
import json
import os
import tarfile
from concurrent import futures

import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image

from clip_jax.data import files, sources, tfrecord
from clip_jax.data.folder import ImageFolder
from clip_jax.data.tar import TarShards
from clip_jax.errors import BadExample, UserError
from configs import default


def open_source(**spec) -> sources.Source:
    return sources.create(default.source(**spec), image_size=16, seed=0)


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, members: list[tuple[str, bytes]], **options) -> None:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample(key: str, caption: str, shade: int = 0) -> list[tuple[str, bytes]]:
    record = json.dumps({"caption": caption, "alt": f"{caption}!", "kind": caption[0]})
    return [
        (f"{key}.png", picture(shade)),
        (f"{key}.txt", caption.encode()),
        (f"{key}.json", record.encode()),
    ]


def contents(source: sources.Source) -> list[tuple[str, str]]:
    examples = [source[i] for i in range(len(source))]
    return [(example.key, example.text) for example in examples]


class TestTar:
    def test_samples_as_written(self, tmp_path):
        for shard in range(3):
            members = [m for i in range(4) for m in sample(f"{i:03}", f"{shard} {i}", 9 * i)]
            write_tar(tmp_path / f"{shard:02}.tar", members)
        source = open_source(type="tar", path=str(tmp_path / "*.tar"))
        assert contents(source) == [
            (f"{shard:02}.tar/{i:03}", f"{shard} {i}") for shard in range(3) for i in range(4)
        ]
        assert [source[i].image for i in range(12)] == [picture(9 * (i % 4)) for i in range(12)]
        assert {source[i].label for i in range(12)} == {-1}
        assert source.class_names == ()
        assert not source.problems

    @pytest.mark.parametrize(
        ("paths", "count"),
        [
            ("{0}/*.tar", 3),
            ("{0}", 3),
            ("{0}/{{00..01}}.tar", 2),
            ("{0}/00.tar,{0}/02.tar", 2),
            ("{0}/0[12].tar, {0}/00.tar", 3),
        ],
    )
    def test_ways_to_name_shards(self, tmp_path, paths, count):
        for shard in range(3):
            write_tar(tmp_path / f"{shard:02}.tar", sample("a", f"caption {shard}"))
        assert len(TarShards(paths.format(tmp_path), "", "")) == count

    def test_captions_and_classes_of_the_json(self, tmp_path):
        write_tar(tmp_path / "a.tar", [*sample("0", "dog"), *sample("1", "cat")])
        source = open_source(type="tar", path=str(tmp_path), text_key="alt", label_key="kind")
        assert contents(source) == [("a.tar/0", "dog!"), ("a.tar/1", "cat!")]
        assert source.class_names == ("c", "d")
        assert [source[0].label, source[1].label] == [1, 0]

    def test_json_stands_in_for_txt(self, tmp_path):
        members = [*sample("0", "one"), *sample("1", "two")]
        write_tar(tmp_path / "a.tar", [m for m in members if m[0] != "1.txt"])
        assert [text for _, text in contents(TarShards(str(tmp_path), "", ""))] == ["one", "two"]

    def test_integer_classes_stay(self, tmp_path):
        members = [("0.png", b"x"), ("0.json", b'{"caption": "a", "y": 7}')]
        members += [("1.png", b"x"), ("1.json", b'{"caption": "b"}')]
        write_tar(tmp_path / "a.tar", members)
        source = TarShards(str(tmp_path), "", "y")
        assert [source[0].label, source[1].label] == [7, -1]
        assert source.class_names == ()
        with pytest.raises(UserError, match="label_key"):
            TarShards(str(tmp_path), "", "z")

    @pytest.mark.parametrize("format_", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    def test_odd_members(self, tmp_path, format_):
        """Long and non-ASCII names, folders, scattered files, other files, the same key twice."""
        members = [
            ("d/0.jpg", b"first"),
            (f"{'long' * 60}.png", b"second"),
            ("é.webp", b"third"),
            ("../../etc/evil.png", b"fourth"),
            ("notes.md", b"nothing"),
            ("d/0.txt", b"1"),
            ("../../etc/evil.txt", b"4"),
            (f"{'long' * 60}.txt", b"2"),
            ("é.txt", b"3"),
            ("é.WEBP", b"fifth"),
            ("é.txt", b"5"),
        ]
        write_tar(tmp_path / "a.tar", members, format=format_)
        source = TarShards(str(tmp_path), "", "")
        found = {source[i].image: source[i].text for i in range(len(source))}
        assert found == {
            b"first": "1",
            b"second": "2",
            b"third": "3",
            b"fourth": "4",
            b"fifth": "5",
        }
        assert source[0].key == "a.tar/d/0"
        assert not source.problems

    def test_keys_without_caption_or_image_are_counted(self, tmp_path):
        members = [("0.png", b"x"), *sample("1", "whole"), ("2.txt", b"t"), ("3.png", b"x")]
        write_tar(tmp_path / "a.tar", members)
        source = TarShards(str(tmp_path), "", "")
        assert contents(source) == [("a.tar/1", "whole")]
        assert source.problems == {"no caption": 2, "no image": 1}

    def test_every_cut_keeps_the_whole_samples(self, tmp_path):
        path = tmp_path / "a.tar"
        write_tar(path, [m for i in range(3) for m in sample(f"{i}", f"caption {i}")])
        whole = path.read_bytes()
        with tarfile.open(path) as tar:
            # A sample is whole once its image and its .txt are.
            ends = [m.offset_data + 512 for m in tar.getmembers() if m.name.endswith(".txt")]
        for cut in range(ends[0], ends[-1] + 1024, 256):
            path.write_bytes(whole[:cut])
            source = TarShards(str(path), "", "")
            assert len(source) == sum(end <= cut for end in ends), cut
            assert contents(source) == [(f"a.tar/{i}", f"caption {i}") for i in range(len(source))]
            assert source.problems == {"damaged shard": 1}

    def test_damaged_header_is_reported(self, tmp_path):
        path = tmp_path / "a.tar"
        write_tar(path, [m for i in range(3) for m in sample(f"{i}", f"caption {i}")])
        with tarfile.open(path) as tar:
            place = tar.getmember("1.png").offset
        data = bytearray(path.read_bytes())
        data[place : place + 512] = b"\xff" * 512
        path.write_bytes(data)
        source = TarShards(str(path), "", "")
        assert contents(source) == [("a.tar/0", "caption 0")]
        assert source.problems == {"damaged shard": 1}

    def test_missing_and_foreign_files_do_not_end_the_run(self, tmp_path):
        write_tar(tmp_path / "00.tar", sample("0", "here"))
        (tmp_path / "02.tar").write_bytes(b"<html>not a tar</html>" * 100)
        (tmp_path / "03.tar").write_bytes(b"")
        source = TarShards(str(tmp_path / "{00..03}.tar"), "", "")
        assert contents(source) == [("00.tar/0", "here")]
        assert source.problems == {"damaged shard": 3}

    def test_shard_that_vanishes_is_retried_then_named(self, tmp_path, monkeypatch):
        write_tar(tmp_path / "0.tar", [*sample("a", "one"), *sample("b", "two")])
        source = TarShards(str(tmp_path), "", "")
        waits = []

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 2:
                os.rename(tmp_path / "away.tar", tmp_path / "0.tar")

        monkeypatch.setattr(files.time, "sleep", sleep)
        os.rename(tmp_path / "0.tar", tmp_path / "away.tar")
        assert source[0].text == "one"  # is back at the third try
        assert len(waits) == 2
        (tmp_path / "0.tar").unlink()
        with pytest.raises(BadExample, match=r"0\.tar") as caught:
            source[1]
        assert caught.value.reason == "missing shard"
        waited = len(waits)
        with pytest.raises(BadExample):
            source[0]
        assert len(waits) == waited  # known to be missing: not waited for again

    def test_shard_cut_after_indexing(self, tmp_path):
        path = tmp_path / "0.tar"
        write_tar(path, [*sample("a", "one"), *sample("b", "two")])
        source = TarShards(str(path), "", "")
        path.write_bytes(path.read_bytes()[:3000])
        assert source[0].text == "one"
        with pytest.raises(BadExample) as caught:
            source[1]
        assert caught.value.reason == "truncated shard"

    def test_unusable_captions(self, tmp_path):
        members = [("0.png", b"x"), ("0.txt", b"caf\xe9")]
        members += [("1.png", b"x"), ("1.json", b"{")]
        members += [("2.png", b"x"), ("2.json", b'{"caption": null}')]
        members += [("3.png", b"x"), ("3.json", b"[1]")]
        write_tar(tmp_path / "0.tar", members)
        source = TarShards(str(tmp_path), "", "")
        reasons = []
        for index in range(4):
            with pytest.raises(BadExample) as caught:
                source[index]
            assert caught.value.key == f"0.tar/{index}"
            reasons.append(caught.value.reason)
        assert reasons == [
            "invalid UTF-8 caption",
            "unreadable json",
            "no caption",
            "unreadable json",
        ]

    def test_nothing_found(self, tmp_path):
        with pytest.raises(UserError, match=r"No tar shards match.*absent"):
            TarShards(str(tmp_path / "absent*.tar"), "", "")
        with pytest.raises(UserError, match="No tar shards match"):
            TarShards("", "", "")
        write_tar(tmp_path / "0.tar", [("a.png", b"x")])
        with pytest.raises(UserError, match=r"No usable sample.*no caption"):
            TarShards(str(tmp_path), "", "")


class TestFolder:
    ROWS = (("x/a.png", "one, two"), ("b.png", "“zwei”"), ("c.png", ""))

    def images(self, path) -> None:
        (path / "x").mkdir()
        for shade, (name, _) in enumerate(self.ROWS):
            (path / name).write_bytes(picture(shade))

    def write_table(self, path, name: str, columns: tuple[str, str]) -> None:
        rows = [dict(zip(columns, row), kind=row[0][0]) for row in self.ROWS]
        if name.endswith("jsonl"):
            (path / name).write_text("\n".join(map(json.dumps, rows)))
        elif name.endswith("parquet"):
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path / name)
        else:
            mark = "\t" if name.endswith("tsv") else ","
            lines = [mark.join(f'"{cell}"' for cell in row.values()) for row in rows]
            text = "\n".join([mark.join(rows[0]), *lines])
            (path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())

    @pytest.mark.parametrize(
        ("name", "columns"),
        [
            ("captions.csv", ("image", "caption")),
            ("captions.tsv", ("filepath", "title")),
            ("captions.jsonl", ("file_name", "text")),
            ("captions.parquet", ("image", "caption")),
            ("metadata.csv", ("file_name", "words")),
        ],
    )
    def test_tables(self, tmp_path, name, columns):
        self.images(tmp_path)
        self.write_table(tmp_path, name, columns)
        text_key = "words" if "words" in columns else ""
        source = open_source(type="folder", path=str(tmp_path), text_key=text_key, label_key="kind")
        assert contents(source) == list(self.ROWS)
        assert [source[i].image for i in range(3)] == [picture(shade) for shade in range(3)]
        assert source.class_names == ("b", "c", "x")
        assert [source[i].label for i in range(3)] == [2, 0, 1]
        (tmp_path / "b.png").unlink()
        with pytest.raises(BadExample) as caught:
            source[1]
        assert (caught.value.reason, caught.value.key) == ("missing image", "b.png")

    def test_wrong_column(self, tmp_path):
        self.images(tmp_path)
        self.write_table(tmp_path, "captions.csv", ("image", "words"))
        with pytest.raises(UserError, match=r"source\.text_key.*words"):
            ImageFolder(str(tmp_path), "", "")
        with pytest.raises(UserError, match="label_key"):
            ImageFolder(str(tmp_path), "words", "species")

    def test_captions_beside_images(self, tmp_path):
        self.images(tmp_path)
        (tmp_path / "x" / "a.txt").write_text("of a")
        (tmp_path / "b.json").write_text('{"caption": "of b", "alt": "alternative", "kind": 3}')
        source = ImageFolder(str(tmp_path), "", "")
        assert contents(source) == [("b.png", "of b"), ("x/a.png", "of a")]
        assert source.problems == {"no caption": 1}
        source = ImageFolder(str(tmp_path), "alt", "kind")
        assert contents(source) == [("b.png", "alternative")]
        assert source[0].label == 3

    def test_folders_as_classes(self, tmp_path):
        for name in ("great_dane", "cat"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "1.png").write_bytes(picture(1))
        source = ImageFolder(str(tmp_path), "", "")
        assert source.class_names == ("cat", "great_dane")
        assert contents(source) == [
            ("cat/1.png", "a photo of a cat."),
            ("great_dane/1.png", "a photo of a great dane."),
        ]
        assert [source[0].label, source[1].label] == [0, 1]
        for name in ("great_dane", "cat"):
            (tmp_path / name).rename(tmp_path / str(len(name)))
        assert ImageFolder(str(tmp_path), "", "").class_names == ("10", "3")

    def test_nothing_found(self, tmp_path):
        with pytest.raises(UserError, match="no directory"):
            ImageFolder(str(tmp_path / "absent"), "", "")
        with pytest.raises(UserError, match="no directory"):
            ImageFolder("", "", "")
        with pytest.raises(UserError, match=r"0 images.*captions\.csv.*KEY\.txt"):
            ImageFolder(str(tmp_path), "", "")
        (tmp_path / "a.png").write_bytes(picture(0))
        with pytest.raises(UserError, match="1 images and no captions"):
            ImageFolder(str(tmp_path), "", "")
        (tmp_path / "captions.csv").write_text("image,caption\n")
        with pytest.raises(UserError, match="no rows"):
            ImageFolder(str(tmp_path), "", "")


def store(data_dir, file_format: str) -> None:
    """Prepares a set of 20 images with two captions and a class each."""
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="png"),
            "captions": tfds.features.Sequence({"text": tfds.features.Text(), "id": np.int64}),
            "nested": {"words": tfds.features.Text()},
            "label": tfds.features.ClassLabel(names=["even", "odd"]),
            "pixels": tfds.features.Tensor(shape=(2, 2, 1), dtype=np.uint8),
        }
    )
    examples = [
        (
            i,
            {
                "image": np.full((5, 4, 3), i, np.uint8),
                "captions": [{"text": f"caption {i}", "id": i}, {"text": "second", "id": 0}],
                "nested": {"words": f"words {i}"},
                "label": i % 2,
                "pixels": np.full((2, 2, 1), i, np.uint8),
            },
        )
        for i in range(20)
    ]
    tfds.dataset_builders.store_as_tfds_dataset(
        name="tiny_pairs",
        version="1.0.0",
        features=features,
        split_datasets={"train": examples, "test": examples[:3]},
        data_dir=data_dir,
        file_format=file_format,
        disable_shuffling=True,
    )


@pytest.fixture(scope="module", params=["tfrecord", "array_record"])
def prepared(request, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp(request.param)
    store(path, request.param)
    return str(path)


class TestTfds:
    def test_examples(self, prepared):
        source = open_source(
            type="tfds", path=prepared, name="tiny_pairs", split="train", label_key="label"
        )
        assert len(source) == 20
        assert source.class_names == ("even", "odd")
        for index in range(20):
            example = source[index]
            assert example.text == f"caption {index}"
            assert example.label == index % 2
            assert (
                np.asarray(Image.open(io.BytesIO(example.image))).tolist()
                == [[[index] * 3] * 4] * 5
            )
        assert not source.problems

    def test_named_features_and_slices(self, prepared):
        source = open_source(
            type="tfds",
            path=prepared,
            name="tiny_pairs:1.0.0",
            split="train[50%:]+test",
            image_key="pixels",
            text_key="nested/words",
        )
        assert [source[i].text for i in range(len(source))] == [
            f"words {i}" for i in [*range(10, 20), *range(3)]
        ]
        np.testing.assert_array_equal(source[0].image, np.full((2, 2, 3), 10))
        assert source[0].label == -1

    def test_wrong_names(self, prepared):
        spec = {"type": "tfds", "path": prepared, "name": "tiny_pairs", "split": "train"}
        for change, message in [
            ({"name": "tinny_pears"}, "knows no dataset"),
            ({"name": ""}, "source.name"),
            ({"split": "valid"}, "train, test"),
            ({"split": ""}, "train, test"),
            ({"split": "train[:"}, "train, test"),
            ({"image_key": "img"}, "image_key.*captions/text.*nested/words"),
            ({"text_key": "words"}, "text_key.*nested/words"),
            ({"label_key": "class"}, "label_key.*label"),
        ]:
            with pytest.raises(UserError, match=message):
                open_source(**{**spec, **change})

    def test_many_threads(self, prepared):
        source = open_source(type="tfds", path=prepared, name="tiny_pairs", split="train")
        order = np.random.default_rng(0).integers(20, size=1000)
        with futures.ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(lambda index: source[int(index)].text, order))
        assert texts == [f"caption {index}" for index in order]

    def test_not_prepared(self, tmp_path):
        with pytest.raises(UserError, match=f"tfds build mnist --data_dir={tmp_path}"):
            open_source(type="tfds", path=str(tmp_path), name="mnist", split="train")

    def test_cut_tfrecord(self, tmp_path):
        store(tmp_path, "tfrecord")
        (path,) = tmp_path.glob("tiny_pairs/1.0.0/*train*")
        path.write_bytes(path.read_bytes()[:-10])
        source = open_source(type="tfds", path=str(tmp_path), name="tiny_pairs", split="train")
        assert len(source) == 19
        assert source[18].text == "caption 18"
        assert source.problems == {"damaged file": 1}


def test_tfrecord_offsets(tmp_path):
    """Against TensorFlow's own reader."""
    import tensorflow as tf

    records = [bytes([i]) * (i * 7) for i in range(50)]
    with tf.io.TFRecordWriter(str(tmp_path / "a")) as writer:
        for record in records:
            writer.write(record)
    instruction = ConfigDict(
        {"filename": str(tmp_path / "a"), "skip": 3, "take": -1, "examples_in_shard": 50}
    )
    source = tfrecord.TfRecords([instruction, instruction], {})
    assert [source[i] for i in range(len(source))] == records[3:] * 2


def test_synthetic():
    source = open_source(type="synthetic", size=5)
    assert len(source) == 5
    for index in range(5):
        first, again = source[index], source[index]
        assert first.image.shape == (16, 16, 3)
        assert first.image.dtype == np.uint8
        np.testing.assert_array_equal(first.image, again.image)
        assert first.text == again.text != ""
    assert not np.array_equal(source[0].image, source[1].image)
    with pytest.raises(UserError, match=r"source\.size"):
        open_source(type="synthetic")


def test_digits():
    source = open_source(type="digits", split="test")
    assert len(source.class_names) == 10
    assert source[0].image.shape == (16, 16, 3)


@pytest.mark.parametrize("type_", ["", "webdataset"])
def test_unknown_type(type_):
    with pytest.raises(UserError, match=r"--config\.data\.source\.type=digits"):
        open_source(type=type_)
