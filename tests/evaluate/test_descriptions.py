"""Descriptions of data sets in directories and JSON files, valid and invalid."""

import json

import pytest
from shards import picture
from tiny_sets import npy, write_benchmark

from clip_jax.errors import UserError
from clip_jax.evaluate.sets import finding, registry


def write_images(root, *names: str) -> None:
    for shade, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "1.png").write_bytes(picture(shade))


def labels(path, split: str = "test") -> list[tuple[int, ...]]:
    source = finding.open_split(registry.get(str(path)), split, "", image_size=16)
    return [source[i].labels for i in range(len(source))]


def test_class_folders(tmp_path):
    write_images(tmp_path / "pets", "cat", "great_dane", "wild/lynx")
    found = registry.get(str(tmp_path / "pets"))
    assert (found.name, found.kind, found.metric) == ("pets", "classification", "accuracy")
    assert found.class_names == ("cat", "great dane", "wild lynx")
    assert found.prompts == {"own": ("a photo of a {}.",)}
    assert found.splits == ("test",)
    assert labels(tmp_path / "pets") == [(0,), (1,), (2,)]
    with pytest.raises(UserError, match="pets has no split for train; it has: test"):
        labels(tmp_path / "pets", "train")


def test_folders_with_splits(tmp_path):
    write_images(tmp_path, "train/b", "train/a", "train/c", "val/c", "test/b", "test/c")
    found = registry.get(str(tmp_path))
    assert found.class_names == ("a", "b", "c")
    assert found.splits == ("train", "validation", "test")
    assert labels(tmp_path) == [(1,), (2,)]
    assert labels(tmp_path, "train") == [(0,), (1,), (2,)]
    assert labels(tmp_path, "validation") == [(2,)]


def test_a_class_called_train_is_no_split(tmp_path):
    write_images(tmp_path, "bus", "car", "train")
    assert registry.get(str(tmp_path)).class_names == ("bus", "car", "train")
    assert labels(tmp_path) == [(0,), (1,), (2,)]


def test_benchmark_layout(tmp_path):
    described = {"classnames": "cat\nbig_dog\n", "zeroshot_classification_templates": "the {c}.\n"}
    write_benchmark(tmp_path / "one", "test", [("cls", b"1"), ("cls", b"0")], **described)
    found = registry.get(str(tmp_path / "one"))
    assert found.class_names == ("cat", "big_dog")
    assert found.prompts == {"own": ("the {}.",)}
    assert labels(tmp_path / "one") == [(1,), (0,)]
    vectors = [("npy", npy([1, 0, 1])), ("npy", npy([0, 0, 0]))]
    described = {"classnames": "a\nb\nc\n", "dataset_type": "multilabel\n"}
    write_benchmark(tmp_path / "many", "test", vectors, **described)
    found = registry.get(str(tmp_path / "many"))
    assert (found.metric, found.multi_label) == ("map_11_point", True)
    assert labels(tmp_path / "many") == [(0, 2), ()]
    write_benchmark(tmp_path / "texts", "test", [("txt", b"a\nb")], dataset_type="retrieval\n")
    assert registry.get(str(tmp_path / "texts")).kind == "retrieval"
    assert labels(tmp_path / "texts") == [()]


def write_json(path, **fields) -> str:
    path.write_text(json.dumps(fields))
    return str(path)


def test_json(tmp_path):
    write_images(tmp_path / "birds" / "test", "erithacus_rubecula", "Blue-Tit", "dog")
    path = write_json(
        tmp_path / "garden.json",
        title="Birds of my garden",
        metric="mean_per_class",
        class_names=["wren", "robin|European robin", "blue tit"],
        prompts={"own": ["a {}, a bird.", "a {} in a garden."], "short": ["{}"]},
        naming={"aliases": {"erithacus_rubecula": "robin"}, "ignored": ["dog"]},
        where={"path": "birds"},
    )
    found = registry.resolve(f"digits,{path}")[1]
    assert (found.name, found.title, found.metric) == (
        *("garden", "Birds of my garden", "mean_per_class"),
    )
    assert found.prompt_set("short").templates == ("{}",)
    assert labels(path) == [(2,), (), (1,)]


def test_json_that_leaves_the_rest_to_the_folders(tmp_path):
    write_images(tmp_path, "cat", "dog")
    path = write_json(
        tmp_path / "few.json", prompts={"own": ["my {}"]}, where={"splits": {"test": ["."]}}
    )
    found = registry.get(path)
    assert (found.title, found.class_names) == ("few", ("cat", "dog"))
    assert labels(path) == [(0,), (1,)]


def test_json_with_a_table(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    (tmp_path / "all.csv").write_text("image,kind,home\n0.png,b;a,x\n1.png,a,y\n2.png,,y\n")
    path = write_json(
        tmp_path / "set.json",
        class_names=["a", "b"],
        metric="map_11_point",
        multi_label=True,
        where={
            "table": {"files": {"test": ["all.csv"]}, "label_key": "kind", "group_keys": "home"}
        },
    )
    assert labels(path) == [(1, 0), (0,), ()]
    source = finding.open_split(registry.get(path), "test", "", image_size=16)
    assert [source[i].groups for i in range(3)] == [("x",), ("y",), ("y",)]


def test_json_as_a_shift(tmp_path):
    write_images(tmp_path / "drawn", "seven", "3")
    digit = [f"{word}|{n}" for n, word in ((3, "three"), (7, "seven"))]
    path = write_json(
        tmp_path / "drawn.json",
        class_names=digit,
        base="digits",
        base_classes=[3, 7],
        where={"path": "drawn", "splits": {"test": ["."]}},
    )
    assert registry.get(path).base_classes == ((3,), (7,))
    assert labels(path) == [(0,), (1,)]


def test_json_as_a_shift_with_the_classes_of_its_base(tmp_path):
    write_images(tmp_path / "drawn", "n01440764", "n01443537")
    path = write_json(tmp_path / "drawn.json", base="imagenet", where={"path": "drawn"})
    found = registry.get(path)
    assert found.class_names == registry.get("imagenet").class_names
    assert len(found.prompts["paper"]) == 80
    assert labels(path) == [(0,), (1,)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_name": ["a"]}, r"unknown field 'class_name'.*Is 'class_names' meant\?"),
        ({"where": {"dir": "x"}}, r'"where" of .*unknown field \'dir\''),
        ({"naming": {"alias": {}}}, "Is 'aliases' meant"),
        ({"naming": {"left_out": ["a"]}}, "Is 'ignored' meant"),
        ({"where": {"validation_share": 0.2}}, "Is 'validation_fraction' meant"),
        ({"class_names": "abc"}, "'class_names' in .* must be a list of texts"),
        ({"class_names": [1, 2]}, "'class_names' in .* must be a list of texts"),
        ({"where": {"splits": {"test": "here"}}}, "'splits' in .* object of lists of texts"),
        ({"base": "digits", "base_classes": 3}, "'base_classes' in .* must be a list"),
        ({"prompts": {"own": "a {}"}}, "prompts 'own' of .* name others"),
        ({"prompts": ["a {}"]}, '"prompts" of .* must be a JSON object'),
        ({"multi_label": "yes"}, "'multi_label' in .* must be true or false"),
        ({"where": {"tfds": {"name": "mnist"}}}, r'"tfds" of .* lacks the field \'splits\''),
        (
            {"class_names": ["a", "b"], "prompts": {"own": ["a photo."]}},
            r"'a photo\.' in .*one \{\}",
        ),
        ({"class_names": ["a"], "prompts": {"own": ["{} or {}"]}}, r"must have exactly one \{\}"),
        ({"class_names": ["a|b", "c", "b"]}, r"name 'b' stands for 2 classes"),
        ({"class_names": ["a", " "]}, "an empty name"),
        ({"class_names": ["a"], "class_sets": {"own": ["a", "b"]}}, r"1 class names, but 2 in own"),
        ({"class_names": ["a"], "metric": "accurracy"}, "'accurracy', and must have one of 'accur"),
        ({"class_names": ["a"], "kind": "detection"}, "kind 'detection'"),
        ({"where": {"tfds": {"name": "x", "splits": {}}}}, "must list its class_names"),
        ({"base": "imagenet1"}, "no data set 'imagenet1'"),
        ({"base": "digits", "base_classes": [[1, 2]]}, "none or several of digits's"),
        ({"base": "digits", "base_classes": [10]}, "has 10, but the classes .* from 0 to 9"),
        (
            {"base": "digits", "class_names": ["a"], "base_classes": ["1"]},
            "has '1', but the classes",
        ),
        ({}, "classes of .* are not known"),
    ],
)
def test_user_errors_in_json(tmp_path, fields, message):
    path = write_json(tmp_path / "set.json", **fields)
    with pytest.raises(UserError, match=message):
        registry.get(path)


def test_invalid_paths(tmp_path):
    (tmp_path / "set.json").write_text("{")
    with pytest.raises(UserError, match=r"set\.json is not JSON"):
        registry.get(str(tmp_path / "set.json"))
    (tmp_path / "set.json").write_text("[1]")
    with pytest.raises(UserError, match="one JSON object"):
        registry.get(str(tmp_path / "set.json"))
    (tmp_path / "set.txt").write_text("")
    with pytest.raises(UserError, match=r"set\.txt is no data set"):
        registry.get(str(tmp_path / "set.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither folders named by class.*classnames\.txt"):
        registry.get(str(tmp_path / "empty"))


def test_aliases_of_nothing(tmp_path):
    write_images(tmp_path, "cat", "dog")
    path = write_json(
        tmp_path / "set.json", class_names=["cat"], naming={"aliases": {"dog": "hound"}}
    )
    with pytest.raises(UserError, match=r"alias 'dog' of set is to stand for 'hound'.*0 of its"):
        labels(path)
