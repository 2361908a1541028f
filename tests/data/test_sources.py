"""Folders, TFDS and the sources without files, against files written by hand in the test."""

import io
import json
from concurrent import futures

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from shards import contents, open_source, picture

from clip_jax.data import teachers
from clip_jax.data.sources.folder import ImageFolder
from clip_jax.errors import BadExample, UserError


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
        with pytest.raises(UserError, match="group_keys"):
            ImageFolder(str(tmp_path), "words", "kind", "race")

    def test_a_named_table_of_classes_and_groups(self, tmp_path):
        """The layout of FairFace: no captions, several classes in a cell, none in another."""
        self.images(tmp_path)
        table = "file,kind,sex,age\nx/a.png,dog; cat,f,20-29\nb.png,,m,\nc.png,cat,f,9\n"
        (tmp_path / "labels.csv").write_text(table)
        source = ImageFolder(str(tmp_path / "labels.csv"), "", "kind", "age, sex")
        assert source.class_names == ("cat", "dog")
        assert [source[i].labels for i in range(3)] == [(1, 0), (), (0,)]
        assert [source[i].label for i in range(3)] == [1, -1, 0]
        assert [source[i].groups for i in range(3)] == [("20-29", "f"), ("", "m"), ("9", "f")]
        assert source[0].captions.texts == ()

    def test_captions_beside_images(self, tmp_path):
        self.images(tmp_path)
        (tmp_path / "x" / "a.txt").write_text("of a")
        (tmp_path / "b.json").write_text(
            '{"caption": "of b", "alt": "alternative", "kind": 3, "many": [4, 2, 4], "old": true}'
        )
        source = ImageFolder(str(tmp_path), "", "")
        assert contents(source) == [("b.png", "of b"), ("x/a.png", "of a")]
        assert source.problems == {"no caption": 1}
        source = ImageFolder(str(tmp_path), "alt", "kind")
        assert contents(source) == [("b.png", "alternative")]
        assert source[0].label == 3
        source = ImageFolder(str(tmp_path), "alt", "many", "old,kind,new")
        assert source[0].labels == (4, 2)
        assert source[0].groups == ("True", "3", "")

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
        assert ImageFolder(str(tmp_path), "", "").class_names == ("3", "10")

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
            "objects": tfds.features.Sequence(
                {"label": tfds.features.ClassLabel(names=["a", "b", "c"]), "area": np.float32}
            ),
            "pixels": tfds.features.Tensor(shape=(2, 2, 1), dtype=np.uint8),
            "teacher": {"image": tfds.features.Tensor(shape=(4,), dtype=np.float16)},
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
                "objects": [{"label": n, "area": 0.5} for n in (2, i % 2, 2)[: i % 4]],
                "pixels": np.full((2, 2, 1), i, np.uint8),
                "teacher": {"image": np.arange(4, dtype=np.float16) - i},
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
        assert source[0].groups == ()

    def test_several_labels_and_groups(self, prepared):
        source = open_source(
            type="tfds",
            path=prepared,
            name="tiny_pairs",
            split="test",
            text_key="captions/text",
            label_key="objects/label",
            group_keys="label,nested/words",
        )
        assert source.class_names == ("a", "b", "c")
        assert [source[i].labels for i in range(3)] == [(), (2,), (2, 0)]
        assert [source[i].groups for i in range(2)] == [("even", "words 0"), ("odd", "words 1")]
        assert source[0].captions.texts == ("caption 0", "second")

    def test_embeddings_by_a_teacher(self, prepared):
        spec = {"type": "tfds", "path": prepared, "name": "tiny_pairs", "split": "train"}
        source = open_source(**spec, group_keys="teacher/image,label")
        embed, label = source[3].groups
        unit = teachers.decode(embed, 4, "")
        np.testing.assert_allclose(unit, np.array([-3, -2, -1, 0]) / 14**0.5, rtol=1e-6)
        assert label == "odd"

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
            ({"group_keys": "label,sex"}, "'sex'.*group_keys.*nested/words"),
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
