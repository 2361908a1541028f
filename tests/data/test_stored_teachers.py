"""Embeddings by teachers, from every kind of storage to the batch."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict
from shards import picture, write_tar

from clip_jax.configs import default
from clip_jax.data import mixture, pipeline, rows, teachers, tokenizer
from clip_jax.errors import UserError

CONTEXT, COUNT = 8, 5
KEYS = "a_image+a_text:4, b_image+b_text:3"
FIELDS = {"a_image": 4, "a_text": 4, "b_image": 3, "b_text": 3}
NAMES = dict(zip(FIELDS, [name for i in range(2) for name in teachers.field_names(i)]))


def embeds(changed=None) -> dict[str, list]:
    """Values by field, one a row; those of row 1 are changed."""
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(COUNT, n)).tolist() for name, n in FIELDS.items()}
    for name, value in (changed or {}).items():
        values[name][1] = value
    return values


def write(folder, kind: str, values, keys: str = KEYS, weight_key: str = "") -> ConfigDict:
    """Pictures whose shade is their number, and the source that reads them."""
    folder.mkdir()
    records = [
        {"caption": f"number {i}", "score": i, **{name: value[i] for name, value in values.items()}}
        for i in range(COUNT)
    ]
    if kind == "tar":
        members = []
        for i, record in enumerate(records):
            members += [(f"{i}.png", picture(i)), (f"{i}.json", json.dumps(record).encode())]
        write_tar(folder / "0.tar", members)
        path = folder / "0.tar"
    elif kind == "tfrecord":
        from clip_jax.common.tensorflow_cpu import tf

        path = folder / "a.tfrecord"
        with tf.io.TFRecordWriter(str(path)) as writer:
            for i, record in enumerate(records):
                example = tf.train.Example()
                feature = example.features.feature
                feature["image"].bytes_list.value.append(picture(i))
                feature["caption"].bytes_list.value.append(record["caption"].encode())
                feature["score"].float_list.value.append(record["score"])
                for name in FIELDS:
                    feature[name].float_list.value.extend(record[name] or [])
                writer.write(example.SerializeToString())
    else:
        for i, record in enumerate(records):
            (folder / f"{i}.png").write_bytes(picture(i))
            record["image"] = f"{i}.png"
        path = folder / f"captions.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(records), path)
        elif kind == "jsonl":
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        else:
            with open(path, "w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(records[0])
                for record in records:
                    cells = (json.dumps(x) if isinstance(x, list) else x for x in record.values())
                    writer.writerow(cells)
    source_type = kind if kind in ("tar", "tfrecord") else "folder"
    return default.source(
        type=source_type, path=str(path), teacher_keys=keys, weight_key=weight_key
    )


def take(source: ConfigDict, **settings):
    """A pipeline, and its first batch."""
    config = default.get_config().data
    config.source = source
    config.update(order="stored", threads=1, max_skipped=1.0, **settings)
    opened, order = mixture.create(config, 4, 0, batch_size=COUNT, parts=1)
    described = rows.Spec(config, "openai", CONTEXT, image_size=4, seed=0, batch_size=COUNT)
    tokens = tokenizer.create("openai", CONTEXT)
    run = pipeline.TrainPipeline(opened, order, tokens, described)
    return run, next(iter(run))


@pytest.mark.parametrize("kind", ["tar", "tfrecord", "parquet", "jsonl", "csv"])
def test_embeddings_go_with_their_images(tmp_path, kind):
    values = embeds()
    _, batch = take(write(tmp_path / "a", kind, values, weight_key="score"))
    assert batch["image"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert batch["weight"].tolist() == [0, 1, 2, 3, 4]
    for name, value in values.items():
        unit = value / np.linalg.norm(value, axis=1, keepdims=True)
        assert batch[NAMES[name]].dtype == np.float32
        np.testing.assert_allclose(batch[NAMES[name]], unit, rtol=1e-6)


def test_sources_of_a_mixture(tmp_path):
    """One has weights, the other none; both have the teacher."""
    config = default.get_config().data
    config.mixture = default.mixture(
        a=write(tmp_path / "a", "tar", embeds(), weight_key="score"),
        b=write(tmp_path / "b", "csv", embeds()),
    )
    config.update(order="stored", threads=1)
    source, order = mixture.create(config, 4, 0, batch_size=10, parts=1)
    spec = rows.Spec(config, "openai", CONTEXT, image_size=4, seed=0, batch_size=10)
    run = pipeline.TrainPipeline(source, order, tokenizer.create("openai", CONTEXT), spec)
    batch = next(iter(run))
    assert batch["weight"].tolist() == [0, 1, 2, 3, 4, 1, 1, 1, 1, 1]
    np.testing.assert_array_equal(batch["teacher/1/text"][:5], batch["teacher/1/text"][5:])


@pytest.mark.parametrize("kind", ["tar", "parquet", "csv"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "no teacher embedding"),
        ([1.0, 2.0], "teacher embedding of 2 numbers, not 4"),
        ([0.0] * 4, "teacher embedding without a direction"),
        ([float("nan"), 0.0, 1.0, 2.0], "teacher embedding without a direction"),
        ([float("inf"), 0.0, 1.0, 2.0], "teacher embedding without a direction"),
    ],
)
def test_faults_are_skipped_and_counted(tmp_path, kind, value, reason):
    run, batch = take(write(tmp_path / "a", kind, embeds({"a_text": value})))
    assert run.skipped == {reason: 1}
    assert np.isfinite(batch["teacher/0/text"]).all()


@pytest.mark.parametrize("value", ["good", {"a": 1}, [1, "x", 2, 3], [[1, 2], [3]], [10**400] * 4])
def test_values_that_are_no_lists_of_numbers(tmp_path, value):
    run, _ = take(write(tmp_path / "a", "tar", embeds({"b_image": value})))
    assert run.skipped == {"unreadable teacher embedding": 1}


def test_an_embedding_of_one_of_several_captions(tmp_path):
    source = write(tmp_path / "a", "tar", embeds() | {"caption": [["a", "b"]] * COUNT})
    with pytest.raises(UserError, match="several captions and one teacher embedding"):
        take(source)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (KEYS.replace(":3", ":512"), "teacher embedding of 3 numbers, not 512"),
        (KEYS.replace("b_text", "b_txt"), "no teacher embedding"),
    ],
)
def test_teachers_that_no_example_has(tmp_path, keys, message):
    """A run says so before it compiles; else each example would be skipped."""
    config = default.get_config().data
    config.mixture = default.mixture(
        a=write(tmp_path / "a", "tar", embeds()), b=write(tmp_path / "b", "tar", embeds())
    )
    source, _ = mixture.create(config, 4, 0, batch_size=10, parts=1)
    teachers.check(config, source)
    config.mixture.b.teacher_keys = keys
    source, _ = mixture.create(config, 4, 0, batch_size=10, parts=1)
    if "512" in keys:
        config.mixture.a.teacher_keys = keys
    with pytest.raises(UserError, match=rf"first 20 examples.*teacher_keys names: .*{message}"):
        teachers.check(config, source)
    with pytest.raises(UserError, match=message):
        take(config.mixture.b)


def test_names_that_are_not_there(tmp_path):
    keys = KEYS.replace("b_text", "b_txt")
    with pytest.raises(UserError, match=r"source\.teacher_keys.*b_txt.*its columns are"):
        take(write(tmp_path / "a", "csv", embeds(), keys=keys))


@pytest.mark.parametrize("keys", ["a:4", "a+b", "a+b:", "a+:4", "+b:4", "a+b:0", "a+b:x", "a+b:-1"])
def test_keys_that_are_not_understood(keys):
    with pytest.raises(
        UserError, match=r"teacher_keys = .* is not understood.*l14_image\+l14_text"
    ):
        teachers.parse(keys)


def test_sources_that_keep_other_teachers():
    config = default.get_config().data
    config.mixture = default.mixture(
        a=default.source(teacher_keys="i+t:768"), b=default.source(teacher_keys="i+t:512")
    )
    with pytest.raises(UserError, match=r"different teachers.*\[768\] and \[512\]"):
        teachers.of_data(config)


def test_teacher_of_the_embedded_digits():
    """It knows which digits a scene shows: those in its caption."""
    source = default.source(type="digits", split="train", teacher_keys="digits+digits:10")
    _, batch = take(source)
    shown = batch["teacher/0/image"] > 0
    assert set(shown.sum(axis=1)) <= {1, 2}
    np.testing.assert_array_equal(batch["teacher/0/image"], batch["teacher/0/text"])
    with pytest.raises(UserError, match=r"digits have no field shapes.*\"digits\""):
        take(default.source(type="digits", split="train", teacher_keys="shapes+digits:10"))
