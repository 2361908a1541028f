"""The identity of the training data: the same wherever they lie, another for other data."""

import csv
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shards import sample, write_tar
from tiny_data import encoded, picture

from clip_jax.configs import default
from clip_jax.data import identity, mixture


def describe(**overrides) -> identity.Identity:
    data = default.get_config().data
    with data.unlocked():
        data.source = default.source(**overrides)
    source, _ = mixture.create(data, 16, 0, batch_size=2, parts=1)
    return identity.describe(data, source)


def differences(old, new) -> list[str]:
    return identity.differences(old, new, ("before", "now"))


def tars(folder, shards: int = 3):
    folder.mkdir(parents=True)
    for shard in range(shards):
        samples = [sample(str(n), f"caption {n}") for n in (shard, shard + 1)]
        write_tar(folder / f"{shard}.tar", [file for files in samples for file in files])


def images(folder):
    (folder / "class").mkdir(parents=True)
    for n in range(3):
        (folder / "class" / f"{n}.png").write_bytes(encoded(picture(n)))


def table(folder):
    images(folder)
    with (folder / "captions.csv").open("w") as file:
        rows = [[f"class/{n}.png", f"caption {n}"] for n in range(3)]
        csv.writer(file).writerows([["image", "caption"], *rows])


def parquet(folder):
    folder.mkdir(parents=True)
    rows = {"image": [encoded(picture(n)) for n in range(3)], "caption": ["a", "b", "c"]}
    pq.write_table(pa.table(rows), folder / "0.parquet")


KINDS = {"tar": tars, "images": images, "table": table, "parquet": parquet}


@pytest.mark.parametrize("kind", KINDS)
def test_moved_data_are_the_same_and_others_are_not(kind, tmp_path):
    KINDS[kind](tmp_path / "a" / "data")
    source = "tar" if kind == "tar" else "folder"
    before = describe(type=source, path=str(tmp_path / "a" / "data"))
    shutil.copytree(tmp_path / "a", tmp_path / "b" / "elsewhere")
    moved = tmp_path / "b" / "elsewhere" / "data"
    assert describe(type=source, path=str(moved)) == before
    if kind == "tar":
        (moved / "1.tar").unlink()
    elif kind == "images":
        (moved / "class" / "1.png").rename(moved / "class" / "7.png")
    elif kind == "table":
        (moved / "captions.csv").write_text((moved / "captions.csv").read_text() + "\n")
    else:
        rows = {"image": [encoded(picture(n)) for n in (4, 5, 6)], "caption": ["d", "e", "f"]}
        pq.write_table(pa.table(rows), moved / "0.parquet")
    (found,) = differences(before, describe(type=source, path=str(moved)))
    if kind == "tar":
        assert found == "source has 6 examples before, 4 examples now, 1 only before (1.tar)"


def test_a_bucket_holds_the_same(bucket, tmp_path):
    tars(tmp_path / "data")
    for path in (tmp_path / "data").glob("*.tar"):
        bucket.put("bucket", f"there/{path.name}", path.read_bytes())
    before = describe(type="tar", path=str(tmp_path / "data"))
    assert describe(type="tar", path="gs://bucket/there/*.tar") == before


def test_sources_without_files():
    digits = describe(type="digits", split="train")
    assert digits == describe(type="digits", split="train")
    assert differences(describe(type="synthetic", size=8), describe(type="synthetic", size=9)) == [
        "source has 8 examples before, 9 examples now"
    ]


def test_mixtures_name_the_part(tmp_path):
    tars(tmp_path / "a")
    tars(tmp_path / "b", 2)

    def mixed(*names: str):
        data = default.get_config().data
        specs = {n: default.source(type="tar", path=str(tmp_path / n), weight=1.0) for n in names}
        with data.unlocked():
            data.mixture = default.mixture(**specs)
        source, _ = mixture.create(data, 16, 0, batch_size=2, parts=1)
        return identity.describe(data, source)

    before = mixed("a", "b")
    assert differences(before, mixed("a")) == ["sources a, b before, a now"]
    (tmp_path / "b" / "0.tar").unlink()
    (found,) = differences(before, mixed("a", "b"))
    assert found.startswith("b has 4 examples before, 2 examples now")
