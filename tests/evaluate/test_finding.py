"""Splits of registered sets on disk, in every layout, and the messages where there are none."""

import csv
import json
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds
from shards import picture
from tiny_sets import digits, encoded, npy, write_benchmark

from clip_jax.errors import UserError
from clip_jax.evaluate.sets import finding, registry
from clip_jax.evaluate.sets.finding import NotOnDisk


def open_split(name: str, split: str, data_dir, **options):
    return finding.open_split(registry.get(name), split, str(data_dir), image_size=16, **options)


def labels(source) -> list[tuple[int, ...]]:
    return [source[i].labels for i in range(len(source))]


@pytest.fixture(autouse=True)
def no_tfds(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))


def write_folders(root, names, count: int = 3) -> None:
    """Class-named folders of digits."""
    for name in names:
        (root / name).mkdir(parents=True)
        for i, (image, _) in enumerate(digits(count)):
            (root / name / f"{i}.png").write_bytes(encoded(image, "PNG"))


# ---- CLIP_benchmark's layout -------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["wds_vtab-eurosat", "eurosat", "vtab/eurosat"])
def test_names_in_another_order(tmp_path, folder):
    """The hub numbers EuroSAT's classes otherwise than the paper."""
    names = (
        "annual crop land\nforest\nbrushland or shrubland\nhighway or road\n"
        "industrial buildings or commercial buildings\npasture land\npermanent crop land\n"
        "residential buildings or homes or apartments\nriver\nlake or sea\n"
    )
    files = [("cls", str(label).encode()) for label in (0, 9, 1, 4)]
    write_benchmark(tmp_path / folder, "test", files, shards=2, classnames=names)
    source = open_split("eurosat", "test", tmp_path)
    found = [source.class_names[label] for (label,) in labels(source)]
    assert found == [
        "annual crop land",
        "lake or sea",
        "forest",
        "industrial buildings or commercial buildings",
    ]
    assert source.class_names == registry.get("eurosat").class_names


def test_multi_label(tmp_path):
    names = sorted(registry.get("voc2007").class_names)
    vector = [name in ("dog", "person", "tvmonitor") for name in names]
    write_benchmark(
        tmp_path / "wds_voc2007_multilabel",
        "test",
        [("npy", npy(vector)), ("npy", npy([False] * 20))],
        classnames="\n".join(names) + "\n",
        dataset_type="multilabel\n",
    )
    source = open_split("voc2007", "test", tmp_path)
    found = [{source.class_names[n] for n in each} for each in labels(source)]
    assert found == [{"dog", "person", "tvmonitor"}, set()]


def test_retrieval(tmp_path):
    texts = [["a three", "the digit 3"], ["one"]]
    files = [("txt", "\n".join(each).encode()) for each in texts]
    write_benchmark(tmp_path / "wds_flickr30k", "test", files, dataset_type="retrieval\n")
    source = open_split("flickr30k", "test", tmp_path)
    assert [list(source[i].captions.texts) for i in range(2)] == texts


def test_names_shared_by_classes_keep_their_order(tmp_path):
    """ImageNet's missiles and sunglasses are told apart by their place alone."""
    names = registry.get("imagenet").class_names
    files = [("cls", str(label).encode()) for label in (657, 744, 836, 837)]
    write_benchmark(tmp_path / "wds_imagenet1k", "test", files, classnames="\n".join(names))
    assert labels(open_split("imagenet", "test", tmp_path)) == [(657,), (744,), (836,), (837,)]


def test_numbers_without_names(tmp_path):
    write_benchmark(tmp_path / "wds_vtab-pets", "test", [("cls", b"3")])
    with pytest.raises(UserError, match=r"labels in .*wds_vtab-pets/test are numbers.*classnames"):
        open_split("oxford_pets", "test", tmp_path)
    write_benchmark(tmp_path / "wds_vtab-pcam", "test", [("cls", b"1"), ("cls", b"0")])
    assert labels(open_split("pcam", "test", tmp_path)) == [(1,), (0,)]
    write_benchmark(tmp_path / "wds_mnist", "test", [("cls", b"10")])
    with pytest.raises(UserError, match=r"label 10 in .*mnist/test, but mnist has 10 classes"):
        open_split("mnist", "test", tmp_path)


def test_names_of_other_classes(tmp_path):
    write_folders(tmp_path / "rendered_sst2" / "test", ["good", "bad", "negative"])
    message = r"2 of 3 classes in .*/test are not classes of rendered_sst2: 'bad', 'good'\."
    with pytest.raises(UserError, match=message):
        open_split("rendered_sst2", "test", tmp_path)


def test_captions_in_place_of_classes(tmp_path):
    write_folders(tmp_path / "rendered_sst2" / "test", ["negative"])
    (tmp_path / "rendered_sst2" / "test" / "negative" / "0.txt").write_text("a caption")
    with pytest.raises(UserError, match=r"images of .*/test have no classes.*without captions"):
        open_split("rendered_sst2", "test", tmp_path)


# ---- Folders and tables ------------------------------------------------------------------------


def test_folders_and_a_part_of_them_for_validation(tmp_path):
    root = tmp_path / "rendered-sst2"
    write_folders(root / "train", ["negative", "positive"], count=20)
    write_folders(root / "test", ["positive"])
    splits = {r: open_split("rendered_sst2", r, tmp_path) for r in ("train", "validation", "test")}
    assert {split: len(source) for split, source in splits.items()} == {
        **{"train": 36, "validation": 4, "test": 3},
    }
    assert labels(splits["test"]) == [(1,)] * 3
    keys = {split: {source[i].key for i in range(len(source))} for split, source in splits.items()}
    assert len(keys["train"] | keys["validation"]) == 40
    begun = [read() for read in splits["train"].start([30, 2])]
    assert begun == [splits["train"][30], splits["train"][2]]
    again = open_split("rendered_sst2", "validation", tmp_path)
    assert {again[i].key for i in range(4)} == keys["validation"]
    write_folders(root / "valid", ["negative"])
    assert len(open_split("rendered_sst2", "train", tmp_path)) == 40
    assert labels(open_split("rendered_sst2", "validation", tmp_path)) == [(0,)] * 3


def test_a_shift_as_distributed(tmp_path):
    """No split; folders by WordNet's identifier, one of them of a class it does not evaluate."""
    write_folders(tmp_path / "imagenet-a", ["n12267677", "n01440764", "n01498041"], count=1)
    source = open_split("imagenet_a", "test", tmp_path)
    assert labels(source) == [(), (0,), (199,)]
    assert source.class_names[199] == "acorn"
    write_folders(tmp_path / "objectnet-1.0" / "images", ["bicycle", "air_freshener"], count=1)
    assert [len(each) for each in labels(open_split("objectnet", "test", tmp_path))] == [0, 1]


def test_folders_named_by_number(tmp_path):
    write_folders(tmp_path / "imagenet_v2" / "test", ["0", "2", "10", "999"], count=1)
    assert labels(open_split("imagenet_v2", "test", tmp_path)) == [(0,), (10,), (2,), (999,)]
    write_folders(tmp_path / "gtsrb" / "test", ["00042", "00003"], count=1)
    assert labels(open_split("gtsrb", "test", tmp_path)) == [(3,), (42,)]
    write_folders(tmp_path / "gtsrb" / "train", ["00043"], count=1)
    with pytest.raises(UserError, match="label 43"):
        open_split("gtsrb", "train", tmp_path)


def test_country_codes(tmp_path):
    write_folders(tmp_path / "country211" / "test", ["ZW", "AD", "XK"], count=1)
    source = open_split("country211", "test", tmp_path)
    found = [source.class_names[label] for (label,) in labels(source)]
    assert found == ["Andorra", "Kosovo", "Zimbabwe"]


def test_tables_with_numbers(tmp_path):
    """The form of Hateful Memes."""
    root = tmp_path / "hateful_memes"
    (root / "img").mkdir(parents=True)
    rows = [{"id": i, "img": f"img/{i}.png", "label": i % 2, "text": f"text {i}"} for i in range(3)]
    for i in range(3):
        (root / "img" / f"{i}.png").write_bytes(picture(i))
    (root / "dev_seen.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_split("hateful_memes", "test", tmp_path)
    assert labels(source) == [(0,), (1,), (0,)]
    assert source[2].text == "text 2"
    with pytest.raises(NotOnDisk, match=r"train split of hateful_memes is not in .*agreement"):
        open_split("hateful_memes", "train", tmp_path)


@pytest.mark.parametrize(
    ("name", "wanted"), [("fairface_race", (6, 3)), ("fairface_gender", (1, 0))]
)
def test_tables_with_groups(tmp_path, name, wanted):
    """The form of FairFace; its directory "val" is for testing."""
    root = tmp_path / "fairface"
    (root / "val").mkdir(parents=True)
    for i in range(2):
        (root / "val" / f"{i}.jpg").write_bytes(picture(i))
    with (root / "fairface_label_val.csv").open("w") as file:
        csv.writer(file).writerows(
            [
                ("file", "age", "gender", "race", "service_test"),
                ("val/0.jpg", "3-9", "Female", "Latino_Hispanic", "True"),
                ("val/1.jpg", "more than 70", "Male", "East Asian", "False"),
            ]
        )
    source = open_split(name, "test", tmp_path)
    assert labels(source) == [(label,) for label in wanted]
    assert [source[i].groups for i in range(2)] == [
        ("Latino_Hispanic", "Female", "3-9"),
        ("East Asian", "Male", "more than 70"),
    ]


def test_captions_a_row_each(tmp_path):
    root = tmp_path / "flickr8k" / "test"
    root.mkdir(parents=True)
    for i in range(2):
        (root / f"{i}.png").write_bytes(picture(i))
    (root / "captions.csv").write_text("image,caption\n0.png,a\n1.png,b\n0.png,c\n0.png,d\n")
    source = open_split("flickr8k", "test", tmp_path)
    assert [source[i].captions.texts for i in range(len(source))] == [("a", "c", "d"), ("b",)]
    assert [source[i].key for i in range(2)] == ["0.png", "1.png"]


def test_classes_of_the_source(tmp_path):
    root = tmp_path / "iiit5k"
    (root / "test").mkdir(parents=True)
    (root / "test.csv").write_text("image,label\ntest/0.png,STOP\ntest/1.png,cafe\n")
    for i in range(2):
        (root / "test" / f"{i}.png").write_bytes(picture(i))
    words = registry.get("iiit5k")
    source = open_split("iiit5k", "test", tmp_path)
    assert finding.with_classes_of(words, source).class_names == ("STOP", "cafe")
    assert labels(source) == [(0,), (1,)]
    mnist = registry.get("mnist")
    assert finding.with_classes_of(mnist, source) is mnist


# ---- TFDS --------------------------------------------------------------------------------------


def prepare(data_dir, name: str, features: dict, splits: dict) -> None:
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={k: list(enumerate(v)) for k, v in splits.items()},
        data_dir=data_dir,
        disable_shuffling=True,
        file_format="array_record",
    )


@pytest.mark.parametrize("place", ["tfds", "data"])
def test_tfds(tmp_path, place):
    """Labels by name; slices; in the data directory and in TFDS's own."""
    names = ["yoyo", "ApplyLipstick", "archery"]
    image = np.zeros((4, 4, 3), np.uint8)
    features = {
        "image": tfds.features.Image(encoding_format="png"),
        "label": tfds.features.ClassLabel(names=names),
        "crowd": tfds.features.ClassLabel(names=["few", "many"]),
    }
    examples = [{"image": image, "label": i % 3, "crowd": i % 2} for i in range(20)]
    prepare(tmp_path / place, "tiny_actions", features, {"train": examples})
    (tmp_path / "actions.json").write_text(
        json.dumps(
            {
                "class_names": list(registry.get("ucf101").class_names),
                "where": {
                    "tfds": {
                        "name": "tiny_actions",
                        "label_key": "label",
                        "group_keys": "crowd",
                        "splits": {"train": "train[:90%]", "test": "train[90%:]"},
                    }
                },
            }
        )
    )
    source = open_split(str(tmp_path / "actions.json"), "test", tmp_path / "data")
    assert [source.class_names[n] for (n,) in labels(source)] == ["Yo Yo", "Apply Lipstick"]
    assert [source[i].groups for i in range(2)] == [("few",), ("many",)]
    assert len(open_split(str(tmp_path / "actions.json"), "train", tmp_path / "data")) == 18


# ---- The embedded sets -------------------------------------------------------------------------


def test_digits():
    parts = {split: open_split("digits", split, "") for split in ("train", "validation", "test")}
    assert [len(source) for source in parts.values()] == [1293, 144, 360]
    keys = [{source[i].key for i in range(len(source))} for source in parts.values()]
    assert len(set.union(*keys)) == 1797
    assert {label for source in parts.values() for (label,) in labels(source)} == set(range(10))
    assert len(open_split("digits_scenes", "test", "")) == 1000
    tests = labels(parts["test"])
    for name in registry.collections()["embedded_shifts"]:
        shift = open_split(name, "test", "")
        assert labels(shift) == tests
        assert shift.class_names == parts["test"].class_names
        assert not np.array_equal(shift[0].image, parts["test"][0].image)


# ---- Missing sets ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data_dir", "wanted"),
    [
        (
            "cifar10",
            "sets",
            "hf download clip-benchmark/wds_vtab-cifar10 --repo-type dataset --local-dir "
            "sets/wds_vtab-cifar10 or tfds build cifar10 --data_dir=sets "
            "--file_format=array_record",
        ),
        ("mscoco", "", "DIR/wds_mscoco_captions or tfds build coco_captions/2014 --file_format"),
        ("birdsnap", "sets", "birdsnap/train/CLASS and birdsnap/test/CLASS"),
        ("hateful_memes", "sets", "agreement with its authors (hatefulmemeschallenge.com)"),
        ("imagenet", "sets", "account and an agreement (image-net.org/download-images"),
        ("country211", "sets", "wget https://openaipublic.azureedge.net/clip/data/country211.tgz"),
    ],
)
def test_the_command_that_fetches_it(name, data_dir, wanted):
    with pytest.raises(NotOnDisk, match=re.escape(wanted)) as caught:
        open_split(name, "test", data_dir)
    assert f"The set {name} is not on disk" in str(caught.value)


@pytest.mark.parametrize("name", registry.names())
def test_every_set_can_be_had(name):
    found = registry.get(name)
    assert found.where.digits or finding.fetching(found, "DIR")


def test_a_split_that_is_missing(tmp_path):
    with pytest.raises(UserError, match="imagenet_a has no split for train; it has: test"):
        open_split("imagenet_a", "train", tmp_path)
    write_folders(tmp_path / "stanford_cars" / "test", ["AM General Hummer SUV 2000"])
    assert len(open_split("stanford_cars", "test", tmp_path)) == 3
    message = r"train split of stanford_cars is not in .*has no directory train or trainval.*wds_c"
    with pytest.raises(NotOnDisk, match=message):
        open_split("stanford_cars", "train", tmp_path)
