"""`data dedup`, then `data pack --keep`: just the images that were listed are gone."""

import csv
import json
import os

import odd_tars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from shards import contents
from tiny_data import encoded
from tiny_data import picture as scene

from clip_jax.curation import cli
from clip_jax.data.sources.tar import TarShards

# The image of each example: the second repeats the first, the last the third.
IMAGES = (1, 1, 2, 3, 2)
UNIQUE = ["0", "2", "3"]  # captions of those that stay
NAMES = ("new\nline", " spaces ", "caf\udce9", "猫", "tab\t\\t")


def picture(seed: int) -> bytes:
    return encoded(scene(seed))


def write_folder(root) -> str:
    for i, (name, seed) in enumerate(zip(NAMES, IMAGES)):
        (root / f"{name}.png").write_bytes(picture(seed))
        (root / f"{name}.txt").write_text(str(i))
    return str(root)


def write_table(root) -> str:
    with open(root / "captions.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for i, (name, seed) in enumerate(zip(NAMES, IMAGES)):
            name = f"{name}.png".replace("\udce9", "é")
            (root / name).write_bytes(picture(seed))
            rows.writerow([name, i])
    return str(root)


def write_jsonl(root) -> str:
    with open(root / "captions.jsonl", "w") as file:
        for i, (name, seed) in enumerate(zip(NAMES, IMAGES)):
            name = f"{name}.png".replace("\udce9", "é")
            (root / name).write_bytes(picture(seed))
            file.write(json.dumps({"image": name, "caption": str(i)}) + "\n")
    return str(root)


def write_parquet(root) -> str:
    for folder, part in (("a", range(2)), ("b", range(2, 5))):
        os.mkdir(root / folder)
        rows = [{"image": picture(IMAGES[i]), "caption": str(i)} for i in part]
        pq.write_table(pa.Table.from_pylist(rows), root / folder / "0.parquet")
    return f"{root}/a/0.parquet,{root}/b/0.parquet"


def write_tars(root) -> str:
    """The same key in two shards of one name, and again in the second of them."""
    for folder, part in (("a", range(1)), ("b", range(1, 5))):
        os.mkdir(root / folder)
        members = [m for i in part for m in (("0.png", picture(IMAGES[i])), ("0.txt", b"%d" % i))]
        (root / folder / "0.tar").write_bytes(odd_tars.archive(members))
    return f"{root}/a/0.tar,{root}/b/0.tar"


def write_odd_names(root) -> str:
    data = b""
    for i, (name, seed) in enumerate(zip(NAMES, IMAGES)):
        raw = name.encode("utf-8", "surrogateescape")
        data += odd_tars.member(raw + b".png", picture(seed))
        data += odd_tars.member(raw + b".txt", b"%d" % i)
    (root / "0.tar").write_bytes(data + odd_tars.END)
    return f"{root}/0.tar"


def write_records(root) -> str:
    with tf.io.TFRecordWriter(f"{root}/0.tfrecord") as writer:
        for i, seed in enumerate(IMAGES):
            named = {
                name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
                for name, value in (("image", picture(seed)), ("caption", b"%d" % i))
            }
            features = tf.train.Features(feature=named)
            writer.write(tf.train.Example(features=features).SerializeToString())
    return f"{root}/0.tfrecord"


def dedup_and_pack(data: str, root) -> list[str]:
    """Returns the captions of the examples that stay."""
    cli.main(["dedup", data, f"--out={root / 'dedup'}", "--workers=1", "--show=0"])
    keep = root / "dedup" / "keep.txt"
    cli.main(["pack", data, f"{root / 'clean'}", f"--keep={keep}", "--workers=1"])
    listed = pq.read_table(root / "dedup" / "duplicates.parquet")["key"].to_pylist()
    kept = keep.read_bytes().decode().split("\n")[:-1]
    assert len({*kept, *listed}) == len(kept) + len(listed)  # no key stands for two
    return [text for _, text in contents(TarShards(f"{root / 'clean'}"))]


@pytest.mark.parametrize(
    "write",
    [
        write_folder,
        write_table,
        write_jsonl,
        write_parquet,
        write_tars,
        write_odd_names,
        write_records,
    ],
)
def test_just_the_listed_images_are_gone(tmp_path, write):
    (tmp_path / "data").mkdir()
    found = dedup_and_pack(write(tmp_path / "data"), tmp_path)
    unique: dict[int, int] = {}
    if write is write_folder:  # read by name
        order = sorted(range(5), key=NAMES.__getitem__)
        for i in order:
            unique.setdefault(IMAGES[i], i)
        assert sorted(found) == sorted(map(str, unique.values()))
    else:
        assert found == UNIQUE


def test_rows_of_one_image_stay_or_go_together(tmp_path, caplog):
    (tmp_path / "data").mkdir()
    for i, seed in enumerate((1, 2, 1)):
        (tmp_path / "data" / f"{i}.png").write_bytes(picture(seed))
    rows = "".join(f"{i % 3}.png,{i}\n" for i in range(6))
    (tmp_path / "data" / "captions.csv").write_text(f"image,caption\n{rows}")
    assert dedup_and_pack(f"{tmp_path / 'data'}", tmp_path) == ["0", "1", "3", "4"]
    assert "3 of the 6 examples" in caplog.text


def test_a_list_of_other_data_is_an_error(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    data = write_tars(tmp_path / "data")
    (tmp_path / "keep.txt").write_text("other.tar/0\n")
    with pytest.raises(SystemExit) as caught:
        cli.main(["pack", data, f"{tmp_path / 'o'}", f"--keep={tmp_path / 'keep.txt'}"])
    assert caught.value.code == 2
    assert "No key of --keep=" in capsys.readouterr().err
