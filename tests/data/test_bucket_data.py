"""Training data in a bucket: equal to the same files on disk, in few requests and bytes."""

import dataclasses
import io
import itertools
import logging
import time

import numpy as np
import pytest
import tensorflow as tf
import tiny_data
from etils import epath
from PIL import Image
from shards import open_source, write_tar
from test_sources import store

from clip_jax.configs import default
from clip_jax.data import mixture, pipeline, rows, tokenizer
from clip_jax.data.sources import shard_index, tar, tar_index
from clip_jax.errors import BadExample, StorageError, UserError
from clip_jax.storage import faults, locations, ranges

SHARDS, EACH, BATCH, SIZE = 6, 40, 24, 16


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Shards of JPEGs of some 20 kB; every sample has a .json file too, which is not needed."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        members = []
        for i in range(shard * EACH, (shard + 1) * EACH):
            noise = np.random.default_rng(i).integers(0, 256, (150, 200, 3), np.uint8)
            image = tiny_data.encoded(Image.fromarray(noise), "JPEG", quality=70)
            members += tiny_data.sample(f"{i:04}", image, f"caption number {i}")
            members.append((f"{i:04}.json", b'{"width": 200}'))
        write_tar(folder / f"{shard}.tar", members)
    return folder


@pytest.fixture
def remote(bucket, local, tmp_path) -> epath.Path:
    """The shards in the bucket, not indexed yet."""
    folder = epath.Path(f"gs://bucket/{tmp_path.name}-{time.monotonic_ns()}")
    for path in sorted(local.glob("*.tar")):
        bucket.put("bucket", f"{folder.name}/{path.name}", path.read_bytes())
    return folder


def start(folder, **changes) -> pipeline.TrainPipeline:
    """The training batches of one host."""
    config = default.get_config().data
    config.update({"threads": 2, "shuffle_window": 80, "chunk": 8, **changes})
    config.source = default.source(type="tar", path=f"{folder}/*.tar")
    source, order = mixture.create(config, SIZE, 3, batch_size=BATCH, parts=1)
    spec = rows.Spec(config, "openai", 12, image_size=SIZE, seed=3, batch_size=BATCH)
    return pipeline.TrainPipeline(source, order, tokenizer.create("openai", 12), spec)


def take(run: pipeline.TrainPipeline, count: int) -> list[dict[str, np.ndarray]]:
    batches = iter(run)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def assert_equal(got: list[dict], want: list[dict]) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want):
        for name in other:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("order", ["shuffled", "windowed", "stored"])
def test_batches_are_those_of_the_disk(local, remote, order):
    assert_equal(take(start(remote, order=order), 25), take(start(local, order=order), 25))


def test_batches_of_processes(local, remote):
    got = take(start(remote, order="windowed", processes=2), 12)
    assert_equal(got, take(start(local, order="windowed"), 12))


# Bytes read for each of the examples' own, and requests for each example.
COSTS = {"shuffled": (1.1, 1.0), "windowed": (1.1, 0.2), "stored": (1.1, 0.1)}


@pytest.mark.parametrize("order", COSTS)
def test_bytes_and_requests_of_an_epoch(bucket, local, remote, order):
    run = start(remote, order=order, prefetch=1)
    bucket.stats(reset=True)
    epoch = SHARDS * EACH // BATCH
    take(run, epoch)
    source = open_source(type="tar", path=f"{local}/*.tar")
    own = sum(len(source[i].image) + len(source[i].text) for i in range(len(source)))
    ahead = (epoch + 2) / epoch  # what had been begun for batches that were not asked for
    overhead, requests = COSTS[order]
    stats = bucket.stats()
    assert own < stats["bytes_out"] < overhead * ahead * own
    assert stats["requests"] <= requests * ahead * len(source)
    assert stats["read_whole"] == 0


def test_faults_change_nothing(bucket, local, remote):
    want = take(start(local), 8)
    run = start(remote)
    bucket.faults(
        [
            {"match": "GET .*tar", "kind": 503, "p": 0.04},
            {"match": "GET .*tar", "kind": 429, "p": 0.04},
            {"match": "GET .*tar", "kind": "truncate", "p": 0.04},
            {"match": "GET .*tar", "kind": "reset", "p": 0.04},
        ]
    )
    assert_equal(take(run, 8), want)
    assert not run.skipped
    assert {"HTTP 503", "HTTP 429", "connection broken"} <= faults.counts().keys()


def test_index_is_stored_and_few_requests_find_it(bucket, remote, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = tar.TarShards(f"{remote}/*.tar")
    names = bucket.names("bucket", remote.name)
    assert f"{remote.name}/clip_jax.tar.index" in names
    monkeypatch.setattr(
        tar_index, "KIND", shard_index.Kind("tar", tar_index.ROW, lambda path: pytest.fail(path))
    )
    bucket.stats(reset=True)
    again = tar.TarShards(f"{remote}/*.tar")
    assert bucket.stats()["requests"] <= 12
    assert [again[i].text for i in range(5)] == [first[i].text for i in range(5)]


def test_start_on_a_thousand_shards(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    image = tiny_data.encoded(tiny_data.picture(0, (8, 8)))
    write_tar(tmp_path / "one.tar", tiny_data.sample("0", image, "a caption"))
    data = (tmp_path / "one.tar").read_bytes()
    folder = f"thousand-{time.monotonic_ns()}"
    for i in range(1000):
        bucket.put("bucket", f"{folder}/{i:05}.tar", data)
    path = f"gs://bucket/{folder}/{{00000..00999}}.tar"
    assert len(tar.TarShards(path)) == 1000  # indexed
    bucket.stats(reset=True)
    assert tar.TarShards(path)[777].text == "a caption"
    assert bucket.stats()["requests"] < 20


def test_index_of_other_shards(remote, bucket, caplog):
    tar.TarShards(f"{remote}/*.tar")
    bucket.put("bucket", f"{remote.name}/1.tar", bucket.get("bucket", f"{remote.name}/2.tar"))
    with caplog.at_level(logging.WARNING):
        source = tar.TarShards(f"{remote}/*.tar")
    assert f"The index of {remote} lacks 1 of 6 shards" in caplog.text
    assert source[EACH].text == source[2 * EACH].text == f"caption number {2 * EACH}"


def test_shard_replaced_or_gone_in_mid_run(remote, bucket, monkeypatch):
    monkeypatch.setattr(faults, "BRIEF", ())
    source = tar.TarShards(f"{remote}/*.tar")
    bucket.put("bucket", f"{remote.name}/1.tar", bucket.get("bucket", f"{remote.name}/2.tar"))
    epath.Path(remote / "3.tar").unlink()
    for index, reason in ((EACH, "replaced shard"), (3 * EACH, "missing shard")):
        with pytest.raises(BadExample) as caught:
            source[index]
        assert caught.value.reason == reason
        assert str(remote) in caught.value.key
    assert source[0].text == "caption number 0"
    run = start(remote, order="stored", max_skipped=0.01)
    epath.Path(remote / "0.tar").unlink()
    with pytest.raises(UserError, match=r"missing shard.*max_skipped"):
        take(run, 100)


def test_rights_that_are_withdrawn_end_in_a_sentence(remote, bucket, monkeypatch):
    monkeypatch.setattr(faults, "RETRY_FOR", 0.5)
    run = start(remote)
    take(run, 1)
    bucket.rights("bucket", "expired")
    run._positions = dataclasses.replace(run._positions, start=10 * BATCH)
    with pytest.raises(StorageError, match=r"refused, or have expired.*resumes"):
        take(run, 2)


def test_other_kinds_of_data(bucket, tmp_path):
    """A folder with a table, one with texts beside the images, and TFRecord files."""
    pictures = [tiny_data.encoded(tiny_data.picture(i)) for i in range(30)]
    for kind in ("table", "beside", "records"):
        (tmp_path / kind).mkdir()
    lines = ["image,caption"]
    for i, data in enumerate(pictures):
        (tmp_path / "table" / f"{i}.png").write_bytes(data)
        lines.append(f"{i}.png,number {i}")
        (tmp_path / "beside" / f"{i}.png").write_bytes(data)
        (tmp_path / "beside" / f"{i}.txt").write_text(f"number {i}")
    (tmp_path / "table" / "captions.csv").write_text("\n".join(lines))
    with tf.io.TFRecordWriter(str(tmp_path / "records" / "a.tfrecord")) as writer:
        for i, data in enumerate(pictures):
            features = {
                "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[data])),
                "text": tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"number %d" % i])),
            }
            example = tf.train.Example(features=tf.train.Features(feature=features))
            writer.write(example.SerializeToString())
    folder = f"kinds-{time.monotonic_ns()}"
    for path in tmp_path.rglob("*"):
        if path.is_file():
            name = path.relative_to(tmp_path).as_posix()
            bucket.put("bucket", f"{folder}/{name}", path.read_bytes())
    for kind, type_ in (("table", "folder"), ("beside", "folder"), ("records", "tfrecord")):
        source = open_source(type=type_, path=f"gs://bucket/{folder}/{kind}")
        order = [int(source[i].text.removeprefix("number ")) for i in range(len(source))]
        assert sorted(order) == list(range(30))
        bucket.latency(0.05)
        began = time.monotonic()
        images = [read().image for read in source.start(range(30))]
        assert time.monotonic() - began < 1.5 or kind == "beside"  # one by one: 1.5 s and more
        bucket.latency(0)
        assert images == [pictures[i] for i in order]


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_tfds(bucket, tmp_path, file_format):
    store(tmp_path, file_format)
    folder = f"tfds-{time.monotonic_ns()}"
    for path in tmp_path.rglob("*"):
        if path.is_file():
            name = path.relative_to(tmp_path).as_posix()
            bucket.put("bucket", f"{folder}/{name}", path.read_bytes())
    spec = {"type": "tfds", "path": f"gs://bucket/{folder}", "name": "tiny_pairs"}
    if file_format == "array_record":
        with pytest.raises(UserError, match=r"ArrayRecord.*--file_format=tfrecord"):
            open_source(**spec, split="train")
        return
    source = open_source(**spec, split="train")
    assert [read().text for read in source.start(range(20))] == [f"caption {i}" for i in range(20)]


def test_table_of_captions_with_one_read(bucket, tmp_path):
    """A table is read by one request for its contents."""
    folder = f"table-{time.monotonic_ns()}"
    bucket.put("bucket", f"{folder}/captions.csv", b"image,caption\na.png,one\n")
    bucket.put("bucket", f"{folder}/a.png", tiny_data.encoded(tiny_data.picture(0)))
    bucket.stats(reset=True)
    source = open_source(type="folder", path=f"gs://bucket/{folder}")
    assert bucket.stats()["read"] == 1
    with Image.open(io.BytesIO(source[0].image)) as image:
        assert image.size == (40, 30)
    assert locations.stat(epath.Path(f"gs://bucket/{folder}/a.png")).size == len(source[0].image)
    assert ranges.read(epath.Path(f"gs://bucket/{folder}/a.png")) == source[0].image
