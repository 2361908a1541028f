"""Rows, files and headers that no writer should make: each costs itself, and is counted."""

import os
import struct
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from etils import epath
from shards import open_source, picture, sample, write_tar

from clip_jax.data.sources import shard_index, tar_index
from clip_jax.errors import BadExample, UserError

GOOD = '{"image": "good.png", "caption": "good"}'
DEEP = '{"a":' * 3000 + "1" + "}" * 3000


def results(**spec) -> list[str]:
    """Returns the caption of every example, or the reason why there is none."""
    source, found = open_source(**spec), []
    for index in range(len(source)):
        try:
            found.append(source[index].text)
        except BadExample as bad:
            found.append(bad.reason)
    return found


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"image": "a\\u0000b.png", "caption": "x"}', "unreadable file"),
        (f'{{"image": "good.png", "caption": {DEEP}}}', "malformed row"),
        (DEEP, "malformed row"),
        ('{"image": "good.png"}', "no caption"),
        ('{"image": "good.png", "caption": 3}', "empty caption"),
        ('{"image": "good.png", "caption": null}', "no caption"),
        ('{"image": "pipe.png", "caption": "x"}', "unreadable file"),
        ('{"image": "loop.png", "caption": "x"}', "unreadable file"),
        ('{"image": "/dev/zero", "caption": "x"}', "unreadable file"),
        ('{"image": "folder.png", "caption": "x"}', "missing image"),
    ],
)
def test_rows_of_tables(tmp_path, monkeypatch, row, reason):
    monkeypatch.setattr("clip_jax.storage.faults.BRIEF", ())
    (tmp_path / "good.png").write_bytes(picture(1))
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("loop.png", tmp_path / "loop.png")
    (tmp_path / "captions.jsonl").write_text(f"{GOOD}\n{row}\n{GOOD}\n")
    assert results(type="folder", path=str(tmp_path)) == ["good", reason, "good"]


@pytest.mark.parametrize("label", ["[[1], {}]", "99999999999999999999", f'"{"9" * 5000}"', "-1"])
def test_labels_that_are_none(tmp_path, label):
    (tmp_path / "good.png").write_bytes(picture(1))
    rows = [GOOD[:-1] + f', "y": {value}}}' for value in ("7", label)]
    (tmp_path / "captions.jsonl").write_text("\n".join(rows))
    source = open_source(type="folder", path=str(tmp_path), label_key="y")
    assert [source[i].labels for i in range(2)] == [(7,), ()]


def npy(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(8)


@pytest.mark.parametrize(
    "data",
    [
        npy(b"{'descr':'<f8','fortran_order':False,'shape':(10000000000000000,)}\n"),
        npy(b"{'descr':'<i8','fortran_order':False,'shape':(-5,)}\n"),
        npy(b"{'descr':"),
        npy(b"(" * 5000),
        npy(b"{'descr':'<U2','fortran_order':False,'shape':(1,)}\n"),
        b"PK\3\4",
        b"",
    ],
)
def test_arrays_of_labels_that_lie(tmp_path, data):
    np.save(tmp_path / "good.npy", np.array([3]))
    good = (tmp_path / "good.npy").read_bytes()
    members = [("0.png", b"x"), ("0.npy", good), ("1.png", b"x"), ("1.npy", data)]
    write_tar(tmp_path / "a.tar", members)
    source = open_source(type="tar", path=str(tmp_path), label_key="npy")
    assert [source[i].labels for i in range(2)] == [(3,), ()]


@pytest.mark.parametrize("column", [0, 1])
def test_a_page_of_parquet_that_does_not_decompress(tmp_path, monkeypatch, column):
    monkeypatch.setattr("clip_jax.storage.faults.BRIEF", ())
    path = tmp_path / "a.parquet"
    rows = [{"image": picture(i), "caption": f"caption {i}"} for i in range(30)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10, compression="zstd")
    place = pq.ParquetFile(path).metadata.row_group(1).column(column).dictionary_page_offset
    data = bytearray(path.read_bytes())
    data[place + 5 : place + 25] = b"\xff" * 20
    path.write_bytes(data)
    found = Counter(results(type="folder", path=str(path)))
    assert found.pop("damaged shard") == 10
    assert found.keys() == {f"caption {i}" for i in (*range(10), *range(20, 30))}


def test_first_records_that_are_none(tmp_path):
    named = {"image": picture(1), "caption": b"good"}
    features = {
        name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        for name, value in named.items()
    }
    good = tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()
    with tf.io.TFRecordWriter(f"{tmp_path}/a.tfrecord") as writer:
        for record in (b"\xff\xff", b"", good):
            writer.write(record)
    path = f"{tmp_path}/a.tfrecord"
    assert results(type="tfrecord", path=path) == ["unreadable record", "no image", "good"]
    with tf.io.TFRecordWriter(path) as writer:
        writer.write(b"\xff\xff")
    with pytest.raises(UserError, match=r"None of the first .*tf\.train\.Example"):
        open_source(type="tfrecord", path=path)


def test_an_index_is_kept_while_it_is_made(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shard_index, "_KEEP_EVERY", 0.0)
    monkeypatch.setattr(shard_index, "_PAUSE", 0.0)
    for i in range(4):
        write_tar(tmp_path / f"{i}.tar", sample("a", "x"))
    paths, scanned = [epath.Path(tmp_path / f"{i}.tar") for i in range(4)], []

    def scan(path: epath.Path) -> shard_index.ScanResult:
        scanned.append(path.name)
        if path.name == "2.tar" and len(scanned) == 3:
            raise KeyboardInterrupt
        return tar_index.scan(path)

    kind = shard_index.Kind("tar", tar_index.ROW, scan)
    monkeypatch.setattr(shard_index, "_scan_some", lambda kind, paths: map(kind.scan, paths))
    with pytest.raises(KeyboardInterrupt):
        shard_index.load(paths, kind)
    assert len(shard_index.load(paths, kind)) == 4
    assert scanned == ["0.tar", "1.tar", "2.tar", "2.tar", "3.tar"]
    assert "lacks 2 of 4 shards" in caplog.text
