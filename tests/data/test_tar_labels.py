"""Tar shards in CLIP_benchmark's layout, against what was written."""

import io
import os

import numpy as np
import pytest
from PIL import Image
from shards import open_source, sample, write_tar
from tiny_sets import digits, npy, write_benchmark

from clip_jax.data.sources import tar_index, tar_labels
from clip_jax.data.sources.tar import TarShards
from clip_jax.errors import UserError

TEMPLATES = 'a photo of the number: "{c}".\n\n{c}.\n'


def test_one_class_each(tmp_path):
    shown = [label for _, label in digits(11)]
    names = "".join(f"the {digit}\n" for digit in range(10))
    files = [("cls", str(label).encode()) for label in shown]
    described = {"classnames": names, "zeroshot_classification_templates": TEMPLATES}
    write_benchmark(tmp_path, "test", files, shards=3, **described)
    source = open_source(type="tar", path=f"{tmp_path}/test", label_key="cls")
    assert [source[i].labels for i in range(len(source))] == [(label,) for label in shown]
    assert source.class_names == tuple(f"the {digit}" for digit in range(10))
    assert source.templates == ('a photo of the number: "{}".', "{}.")
    assert source[10].key == "2.tar/s0000010"
    assert source[10].captions.texts == ()
    for i, (image, _) in enumerate(digits(11)):
        np.testing.assert_array_equal(Image.open(io.BytesIO(source[i].image)), image)


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.bool_])
def test_vectors_of_zeros_and_ones(tmp_path, dtype):
    wanted = [(0,), (1, 3), (), (0, 1, 2, 3)]
    files = [("npy", npy([n in labels for n in range(4)], dtype)) for labels in wanted]
    write_benchmark(tmp_path, "test", files, classnames="a\nb\nc\nd\n", dataset_type="multilabel\n")
    source = open_source(type="tar", path=f"{tmp_path}/test/*.tar", label_key="npy")
    assert [source[i].labels for i in range(4)] == wanted
    assert source.class_names == ("a", "b", "c", "d")


def test_lists_of_classes_and_damaged_files(tmp_path):
    wanted = [(0, 1), (1, 0), (3,), (), ()]
    files = [("npy", npy(labels, np.int64)) for labels in wanted[:4]]
    files.append(("npy", npy([1], object)))  # a pickle: not read
    write_benchmark(tmp_path, "test", files)
    source = TarShards(f"{tmp_path}/test", "", "npy")
    assert [source[i].labels for i in range(5)] == wanted
    assert source.class_names == ()


def test_a_single_number_in_npy(tmp_path):
    write_benchmark(tmp_path, "test", [("npy", npy(n, np.int64)) for n in (0, 1, 1)])
    source = TarShards(f"{tmp_path}/test", "", "npy")
    assert [source[i].labels for i in range(3)] == [(0,), (1,), (1,)]


def test_captions_one_in_a_line(tmp_path):
    texts = [["one", "ein “Ding”", "un"], ["two\u2028halves"]]
    files = [("txt", "\n".join(lines).encode()) for lines in texts]
    write_benchmark(tmp_path, "test", files, dataset_type="retrieval\n")
    source = open_source(type="tar", path=f"{tmp_path}/test")
    assert [list(source[i].captions.texts) for i in range(2)] == texts
    assert source[0].captions.weights == pytest.approx((1 / 3,) * 3)
    (tmp_path / "dataset_type.txt").unlink()
    plain = open_source(type="tar", path=f"{tmp_path}/test")
    assert plain[0].captions.texts == ("\n".join(texts[0]),)


def test_labels_that_are_names_missing_or_unnamed(tmp_path):
    files = [("cls", b"dog\n"), ("cls", b"cat"), ("txt", b"a caption"), ("cls", b"\xff")]
    write_benchmark(tmp_path, "test", files)
    source = TarShards(f"{tmp_path}/test", "", "cls")
    assert source.class_names == ("cat", "dog")
    assert [source[i].labels for i in range(4)] == [(1,), (0,), (), ()]
    write_benchmark(tmp_path / "other", "test", [("cls", b"2")], classnames="a\nb\n")
    with pytest.raises(UserError, match=r"class 2, but\s+classnames\.txt.*only 2"):
        TarShards(f"{tmp_path}/other/test", "", "cls")


def test_groups_of_the_json(tmp_path):
    write_tar(tmp_path / "a.tar", [*sample("0", "dog"), *sample("1", "cat")])
    source = open_source(type="tar", path=str(tmp_path), group_keys="kind,alt,none")
    assert [source[i].groups for i in range(2)] == [("d", "dog!", ""), ("c", "cat!", "")]
    assert source[1].text == "cat"
    assert open_source(type="tar", path=str(tmp_path))[0].groups == ()


def test_indices_for_training_stay_small(tmp_path):
    files = [("cls", b"1"), ("cls", b"0")]
    write_benchmark(tmp_path, "test", files, classnames="a\nb\n")
    TarShards(f"{tmp_path}/test", "", "cls")
    assert tar_index.ROW.itemsize == 27
    assert [name for name in os.listdir(tmp_path / "test") if "index" in name] == [
        "clip_jax.labelled_tar.index"
    ]
    again = TarShards(f"{tmp_path}/test", "", "cls")  # from the index
    assert [again[i].labels for i in range(2)] == [(1,), (0,)]
    with pytest.raises(UserError, match=r"No usable sample.*no caption"):
        TarShards(f"{tmp_path}/test")


def test_empty_class_names_keep_their_place(tmp_path):
    (tmp_path / "classnames.txt").write_text("near\n\nfar \n")
    assert tar_labels.read_layout(tmp_path).class_names == ("near", "", "far")
