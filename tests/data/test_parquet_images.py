"""Images in columns of Parquet files, as the Hugging Face hub has them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shards import contents, open_source, picture

from clip_jax.data.sources import parquet_images
from clip_jax.data.sources.folder import ImageFolder
from clip_jax.embed import inputs
from clip_jax.errors import BadExample, UserError
from clip_jax.evaluate.sets import directories
from clip_jax.evaluate.sets.dataset import Dataset, Location, Table
from clip_jax.storage import ranges


def rows_of(first: int, count: int, column: str = "image") -> list[dict]:
    return [
        {
            column: {"bytes": picture(i), "path": f"{i % 3}.png"},
            "caption": [f"first {i}", f"second {i}"],
            "label": i % 2,
        }
        for i in range(first, first + count)
    ]


def write(path, rows: list[dict], group: int = 4, names: tuple[str, ...] = ()) -> None:
    table = pa.Table.from_pylist(rows)
    if names:
        features = {"label": {"names": list(names), "_type": "ClassLabel"}}
        noted = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": noted})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path, row_group_size=group)


def embed_fields(data, **fields: str) -> dict[str, str]:
    return dict.fromkeys(inputs.FIELDS, "") | {"data": str(data)} | fields


@pytest.mark.parametrize("cache", [{}, {"chunk": 3, "cached_chunks": 2}])
def test_several_files(tmp_path, cache):
    for number in range(2):
        name = f"train-{number:05}-of-00002.parquet"
        write(tmp_path / name, rows_of(10 * number, 10), names=("cat", "dog"))
    for path in (
        tmp_path,
        tmp_path / "train-*.parquet",
        tmp_path / "train-0000{0..1}-of-00002.parquet",
    ):
        source = ImageFolder(str(path), "", "label", **cache)
        assert len(source) == 20
        started = source.start([17, 3, 4, 16, 3])
        assert [read().image for read in started] == [picture(i) for i in (17, 3, 4, 16, 3)]
        assert [source[i].captions.texts for i in (0, 19)] == [
            ("first 0", "second 0"),
            ("first 19", "second 19"),
        ]
        assert [source[i].label for i in range(4)] == [0, 1, 0, 1]
        assert source.class_names == ("cat", "dog")
        keys = [source[i].key for i in range(20)]
        assert keys[11] == "train-00001-of-00002.parquet:1"
        assert len(set(keys)) == 20


def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    """Row groups of 4, neighbours from the same read once; no more than a few are held."""
    write(tmp_path / "x.parquet", rows_of(0, 40))
    read = []
    start = ranges.start
    monkeypatch.setattr(ranges, "start", lambda *span: read.append(span[1]) or start(*span))
    source = ImageFolder(str(tmp_path / "x.parquet"), "", "")
    assert not read
    for load in source.start([8, 9, 10, 11, 30]):
        load()
    assert len(read) == 2
    assert all(size < (tmp_path / "x.parquet").stat().st_size / 8 for ((_, size),) in read)
    assert contents(source) == [(f"x.parquet:{i}", f"first {i}") for i in range(40)]
    assert len(read) == 2 + 10
    read.clear()
    in_runs = ImageFolder(str(tmp_path / "x.parquet"), "", "", chunk=8, cached_chunks=2)
    assert [in_runs[i].image for i in (0, 9, 7, 8, 15)] == [picture(i) for i in (0, 9, 7, 8, 15)]
    assert len(read) == 4


def test_another_column_and_other_types(tmp_path):
    write(tmp_path / "struct.parquet", rows_of(0, 5, "photo"))
    table = pa.table({"photo": pa.array(map(picture, range(5)), pa.large_binary())})
    table = table.append_column("words", pa.array([f"word {i}" for i in range(5)]))
    pq.write_table(table, tmp_path / "binary.parquet", row_group_size=2)
    for name, text_key in (("struct", ""), ("binary", "words")):
        path = str(tmp_path / f"{name}.parquet")
        source = open_source(type="folder", path=path, image_key="photo", text_key=text_key)
        assert [source[i].image for i in range(5)] == [picture(i) for i in range(5)]
        with pytest.raises(UserError, match=r"source\.image_key.*its columns are photo"):
            ImageFolder(path, text_key, "")


def test_structs_with_paths(tmp_path):
    """Bytes where a row has them, else the file that its path names."""
    (tmp_path / "7.png").write_bytes(picture(7))
    for stored in ({"path": "7.png"}, {"bytes": None, "path": "7.png"}):
        write(tmp_path / "x.parquet", [{"image": stored, "caption": "seven"}])
        source = ImageFolder(str(tmp_path / "x.parquet"), "", "")
        assert (source[0].image, source[0].key) == (picture(7), "7.png")
    images = [
        {"bytes": picture(1), "path": None},
        {"bytes": None, "path": "7.png"},
        {"bytes": None, "path": "none.png"},
        {"bytes": b"", "path": None},
        None,
    ]
    write(tmp_path / "x.parquet", [{"image": image, "caption": "a"} for image in images])
    source = ImageFolder(str(tmp_path / "x.parquet"), "", "")
    found = []
    for index in range(5):
        try:
            found.append(source[index].image)
        except BadExample as error:
            found.append((error.reason, error.key))
    missing = [("missing image", "x.parquet:2"), ("no image", "x.parquet:3")]
    assert found == [picture(1), picture(7), *missing, ("no image", "x.parquet:4")]


def test_directories_of_the_hub(tmp_path):
    write(tmp_path / "data" / "train-00000-of-00001.parquet", rows_of(0, 3))
    assert len(ImageFolder(str(tmp_path), "", "")) == 3
    write(tmp_path / "data" / "test-00000-of-00001-0f3a.parquet", rows_of(0, 3))
    with pytest.raises(UserError, match=r"splits test, train.*train-\*\.parquet"):
        ImageFolder(str(tmp_path), "", "")
    assert len(ImageFolder(f"{tmp_path}/data/test-*.parquet", "", "")) == 3
    with pytest.raises(UserError, match=r"No \.parquet files match"):
        ImageFolder(f"{tmp_path}/data/valid-*.parquet", "", "")
    with pytest.raises(UserError, match="There is no file"):
        ImageFolder(f"{tmp_path}/data/valid.parquet", "", "")


def test_other_parquet_files_beside_images_are_not_in_the_way(tmp_path):
    """The layout of img2dataset, with a table of the downloads beside each folder."""
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "a.txt").write_text("a")
    pq.write_table(pa.table({"url": ["http://a"], "caption": ["a"]}), tmp_path / "00000.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"")
    assert contents(ImageFolder(str(tmp_path), "", "")) == [("a.png", "a")]


def test_a_damaged_row_group_costs_its_rows(tmp_path):
    path = tmp_path / "x.parquet"
    write(path, rows_of(0, 12))
    footer = parquet_images.read_footers([path])[0]
    offset = footer.metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 40] = bytes(40)
    path.write_bytes(data)
    for cache in ({}, {"chunk": 5, "cached_chunks": 3}):
        source = ImageFolder(str(path), "", "", **cache)
        for index in range(12):
            if index in range(4, 8):
                with pytest.raises(BadExample, match="row group 1: damaged shard"):
                    source[index]
            else:
                assert source[index].image == picture(index)


def test_a_replaced_file(tmp_path):
    write(tmp_path / "x.parquet", rows_of(0, 8))
    source = ImageFolder(str(tmp_path / "x.parquet"), "", "")
    write(tmp_path / "x.parquet", rows_of(5, 8))
    with pytest.raises(BadExample, match="replaced shard"):
        source[0]


def test_classes_that_have_no_name(tmp_path):
    write(tmp_path / "x.parquet", rows_of(0, 3), names=("only",))
    with pytest.raises(UserError, match="class 1, but its file names only 1"):
        ImageFolder(str(tmp_path / "x.parquet"), "", "label")


def test_an_evaluation_set(tmp_path):
    """Its table is named by a pattern, its columns as for training."""
    for number in range(2):
        name = f"test-{number:05}-of-00002.parquet"
        write(tmp_path / "data" / name, rows_of(5 * number, 5, "photo"), names=("cat", "dog"))
    table = Table({"test": ("data/test-*.parquet",)}, image_key="photo", label_key="label")
    described = Dataset("pets", "Pets", "classification", "accuracy", where=Location(table=table))
    source, place = directories.open_split(described, "test", tmp_path, None)
    assert place == f"{tmp_path}/data/test-*.parquet"
    assert [source[i].image for i in range(10)] == [picture(i) for i in range(10)]
    assert (source.class_names, source[9].label) == (("cat", "dog"), 1)


def test_embedding_tells_images_from_texts(tmp_path):
    write(tmp_path / "images.parquet", rows_of(0, 3))
    pq.write_table(pa.table({"id": [5, 6], "caption": ["a", "b"]}), tmp_path / "texts.parquet")
    (tmp_path / "empty").mkdir()
    assert inputs.is_caption_file(str(tmp_path / "texts.parquet"))
    assert not inputs.is_caption_file(str(tmp_path / "images.parquet"))
    assert inputs.is_caption_file(str(tmp_path / "gone.parquet"))
    source = inputs.open_source(embed_fields(tmp_path / "texts.parquet"))
    assert contents(source) == [("5", "a"), ("6", "b")]
    for data in (tmp_path / "images.parquet", tmp_path / "hub"):
        if data.name == "hub":
            write(data / "train-00000-of-00001.parquet", rows_of(0, 3))
        source = inputs.open_source(embed_fields(data))
        assert [source[i].image for i in range(3)] == [picture(i) for i in range(3)]
        assert inputs.picture_root(str(data)) == ""


@pytest.mark.parametrize("cached", [0, 2])
def test_a_path_that_is_not_utf8_costs_its_row(tmp_path, cached):
    write(tmp_path / "0.parquet", rows_of(0, 3))
    pq.write_table(
        pq.read_table(tmp_path / "0.parquet"), tmp_path / "0.parquet", compression="none"
    )
    damaged = (tmp_path / "0.parquet").read_bytes().replace(b"1.png", b"\xff.png")
    (tmp_path / "0.parquet").write_bytes(damaged)
    source = ImageFolder(str(tmp_path), "", "", chunk=2, cached_chunks=cached)
    assert source[0].image == picture(0)
    with pytest.raises(BadExample) as caught:
        source[1]
    assert caught.value.reason == "malformed row"
    assert source[2].image == picture(2)
