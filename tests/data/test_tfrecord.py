"""TFRecord files, against TensorFlow's own writer and files written by hand."""

import pytest
import tensorflow as tf
from etils import epath
from shards import open_source, picture

from clip_jax.data.sources import tfrecord
from clip_jax.errors import BadExample, UserError


def write_records(path, records: list[bytes]) -> None:
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)


def example(**features) -> bytes:
    def feature(value) -> tf.train.Feature:
        values = value if isinstance(value, list) else [value]
        if isinstance(values[0], int):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=values))
        encoded = [v if isinstance(v, bytes) else v.encode() for v in values]
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=encoded))

    named = {name: feature(value) for name, value in features.items()}
    return tf.train.Example(features=tf.train.Features(feature=named)).SerializeToString()


class TestTfRecords:
    def test_against_tensorflows_writer(self, tmp_path):
        records = [bytes([i]) * (i * 7) for i in range(50)]
        write_records(tmp_path / "a", records)
        path = epath.Path(tmp_path / "a")
        for _ in range(2):  # scanned, then from the index
            source = tfrecord.TfRecords([path, path], [slice(3, None), slice(0, 2)], None)
            assert [source[i] for i in range(len(source))] == records[3:] + records[:2]
            assert source.stored == [50, 50]

    def test_examples(self, tmp_path):
        first = example(image=picture(1), caption=["one", "uno"], kind=["dog", "cat"], id=3)
        second = example(image=picture(2), caption="two", kind="dog")
        write_records(tmp_path / "train.tfrecord", [first, second, b"\xff", example(caption="x")])
        spec = {"type": "tfrecord", "path": str(tmp_path / "*.tfrecord")}
        source = open_source(**spec, label_key="kind", text_key="caption")
        assert [source[i].image for i in range(2)] == [picture(1), picture(2)]
        assert source[0].captions.texts == ("one", "uno")
        assert [source[0].labels, source[1].labels] == [(1, 0), (1,)]
        assert source.class_names == ("cat", "dog")
        grouped = open_source(**spec, group_keys="id,kind")
        assert [grouped[i].groups for i in range(2)] == [("3", "dog"), ("", "dog")]
        assert open_source(**spec)[1].text == "two"
        for index, reason in ((2, "unreadable record"), (3, "no image")):
            with pytest.raises(BadExample) as caught:
                source[index]
            assert caught.value.reason == reason
        with pytest.raises(UserError, match=r"image_key.*caption, id, image, kind"):
            open_source(**spec, image_key="picture")

    def test_nothing_found(self, tmp_path):
        with pytest.raises(UserError, match="No records in the 0 file"):
            open_source(type="tfrecord", path=str(tmp_path))
