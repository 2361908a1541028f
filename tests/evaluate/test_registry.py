"""The registry of data sets: against the paper's counts and TFDS's label files, as installed."""

import importlib
import pathlib
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import tensorflow_datasets as tfds

from clip_jax.errors import UserError
from clip_jax.evaluate.sets import classes, dataset, registry

ROOT = pathlib.Path(__file__).parents[2]
# Classes and templates of the 27 sets (paper, Table 9, and the prompts OpenAI published).
PAPER27 = {
    "food101": (101, 1),
    "cifar10": (10, 18),
    "cifar100": (100, 18),
    "birdsnap": (500, 1),
    "sun397": (397, 2),
    "stanford_cars": (196, 8),
    "fgvc_aircraft": (100, 2),
    "voc2007": (20, 1),
    "dtd": (47, 8),
    "oxford_pets": (37, 1),
    "caltech101": (102, 34),
    "flowers102": (102, 1),
    "mnist": (10, 1),
    "fer2013": (7, 6),
    "stl10": (10, 2),
    "eurosat": (10, 3),
    "resisc45": (45, 18),
    "gtsrb": (43, 3),
    "kitti_distance": (4, 1),
    "country211": (211, 5),
    "pcam": (2, 1),
    "ucf101": (101, 48),
    "kinetics700": (700, 28),
    "clevr_counts": (8, 1),
    "hateful_memes": (2, 1),
    "rendered_sst2": (2, 1),
    "imagenet": (1000, 80),
}
METRICS = {
    "mean_per_class": {"fgvc_aircraft", "oxford_pets", "caltech101", "flowers102"},
    "map_11_point": {"voc2007"},
    "mean_top1_top5": {"kinetics700"},
    "roc_auc": {"hateful_memes"},
}
BUILDERS = "tensorflow_datasets.image_classification"


def lines(path: str) -> list[str]:
    text = pathlib.Path(tfds.core.tfds_path(path)).read_text()
    return [line.strip() for line in text.splitlines() if line.strip()]


def constant(module: str, name: str) -> list[str]:
    return list(getattr(importlib.import_module(f"tensorflow_datasets.{module}"), name))


# Label names of TFDS by label, read from what it installs, and some of them by the paper's name.
TFDS_NAMES = {
    "food101": (
        lambda: lines("image_classification/food-101_classes.txt"),
        {"beef_carpaccio": "beef carpaccio"},
    ),
    "sun397": (
        lambda: lines("image_classification/sun397_labels.txt"),
        {"/j/jail_cell": "jail cell", "/j/jail/indoor": "jail indoor", "/a/abbey": "abbey"},
    ),
    "stanford_cars": (
        lambda: constant("image_classification.cars196", "_NAMES"),
        {"AM General Hummer SUV 2000": "AM General Hummer SUV 2000"},
    ),
    "dtd": (
        lambda: lines("image_classification/dtd_key_attributes.txt"),
        {"zigzagged": "zigzagged"},
    ),
    "oxford_pets": (
        lambda: constant(
            "datasets.oxford_iiit_pet.oxford_iiit_pet_dataset_builder", "_LABEL_CLASSES"
        ),
        {"english_cocker_spaniel": "english cocker spaniel", "Sphynx": "Sphynx"},
    ),
    "caltech101": (
        lambda: lines("image_classification/caltech101_labels.txt"),
        {"faces": "off-center face", "faces_easy": "centered face", "leopards": "leopard"},
    ),
    "flowers102": (
        lambda: constant("datasets.oxford_flowers102.oxford_flowers102_dataset_builder", "_NAMES"),
        {"ball moss": "air plant", "pink primrose": "pink primrose"},
    ),
    "eurosat": (
        lambda: constant("image_classification.eurosat", "_LABELS"),
        {"SeaLake": "lake or sea", "HerbaceousVegetation": "brushland or shrubland"},
    ),
    "resisc45": (
        lambda: constant("datasets.resisc45.resisc45_dataset_builder", "_LABELS"),
        {"baseball_diamond": "baseball diamond"},
    ),
    "ucf101": (
        lambda: lines("video/ucf101_labels.txt"),
        {"JumpRope": "Jump Rope", "JumpingJack": "Jumping Jack", "YoYo": "Yo Yo"},
    ),
    "voc2007": (lambda: constant("object_detection.voc", "_VOC_LABELS"), {"dog": "dog"}),
    "imagenet": (
        lambda: lines("datasets/imagenet2012/labels.txt"),
        {"n01440764": "tench", "n02012849": "crane bird", "n03126707": "construction crane"},
    ),
}


def test_the_papers_sets():
    assert registry.collections()["paper27"] == tuple(PAPER27)
    for name, (count, templates) in PAPER27.items():
        found = registry.get(name)
        assert (len(found.class_names), len(found.prompts["paper"])) == (count, templates), name
        metric = next((m for m, names in METRICS.items() if name in names), "accuracy")
        assert found.metric == metric
        assert found.splits == ("train", "validation", "test")
        assert found.multi_label == (name == "voc2007")
        assert "paper27" in found.collections
    assert registry.collections()["kornblith12"] == tuple(PAPER27)[:12]
    assert len(registry.collections()["shifts"]) == 7
    assert len(registry.get("imagenet").prompts["paper7"]) == 7


@pytest.mark.parametrize("name", registry.names())
def test_every_set_is_sound(name):
    """Names are distinct and the sources are given, beyond what reading checks."""
    found = registry.get(name)
    assert found.title
    assert found.sources
    assert found.splits[-1] == "test"
    for prompts in found.prompts:
        _, class_names, templates = found.prompt_set(prompts)
        assert len(class_names) == len(found.class_names)
        assert len(set(templates)) == len(templates)
        assert all(text.count("{}") == 1 and text == text.strip() for text in templates)
    known = classes.lookup(found)
    for label, names in enumerate(found.class_names):
        for spoken in set(names.split("|")) - set(found.naming.same_names):
            assert known[classes.key(spoken)] == label
    for tfds_split in found.where.tfds.splits.values() if found.where.tfds else ():
        assert tfds_split.partition("[")[0] in ("train", "validation", "val", "test")
    if found.base and found.base_classes:
        base = registry.get(found.base)
        numbers = [n for each in found.base_classes for n in each]
        assert len(numbers) == len(set(numbers))  # no class of the base counts twice
        assert 0 <= min(numbers) <= max(numbers) < len(base.class_names)


@pytest.mark.parametrize("name", TFDS_NAMES)
def test_label_orders_of_tfds(name):
    """Every class of TFDS is one of the set's, and each of these one of TFDS's."""
    load, spots = TFDS_NAMES[name]
    names, found = load(), registry.get(name)
    numbers = classes.match(found, None, names, "TFDS")
    assert sorted(numbers) == list(range(len(found.class_names)))
    for theirs, ours in spots.items():
        assert found.class_names[numbers[names.index(theirs)]] == ours


def test_label_orders_differ():
    """Some sets number their classes in another order than TFDS."""
    differing = set()
    for name, (load, _) in TFDS_NAMES.items():
        numbers = classes.match(registry.get(name), None, load(), "TFDS")
        differing |= {name} if (numbers != np.arange(len(numbers))).any() else set()
    assert differing == {
        *("food101", "sun397", "oxford_pets", "caltech101", "eurosat", "ucf101", "voc2007")
    }


# CLIP_benchmark's order (en_classnames.json).
BENCHMARK_NAMES = {
    "fer2013": "angry disgusted fearful happy neutral sad surprised",
    "clevr_counts": "three four five six seven eight nine ten",
    "svhn": "zero one two three four five six seven eight nine",
}


@pytest.mark.parametrize("name", BENCHMARK_NAMES)
def test_label_orders_of_clip_benchmark(name):
    found = registry.get(name)
    names = BENCHMARK_NAMES[name].split()
    numbers = classes.match(found, None, names, "the hub")
    theirs = found.prompt_set("clip_benchmark").class_names
    assert [theirs[number] for number in numbers] == names
    if name == "clevr_counts":
        assert [found.class_names[n] for n in numbers] == [*"3456789", "10"]


def test_imagenets_shifts():
    imagenet = registry.get("imagenet")
    twice = [name for name, n in Counter(imagenet.class_names).items() if n > 1]
    assert tuple(twice) == imagenet.naming.same_names
    for name, first, last in (
        ("imagenet_a", "stingray", "acorn"),
        ("imagenet_r", "goldfish", "acorn"),
    ):
        shift = registry.get(name)
        assert (len(shift.class_names), shift.class_names[0], shift.class_names[-1]) == (
            *(200, first, last),
        )
        assert shift.prompts == imagenet.prompts
        for names, wordnet, (number,) in zip(
            shift.class_names, shift.naming.ids, shift.base_classes, strict=True
        ):
            assert (names, wordnet) == (imagenet.class_names[number], imagenet.naming.ids[number])
    objectnet = registry.get("objectnet")
    assert (len(objectnet.class_names), len(objectnet.naming.ignored)) == (113, 200)
    bicycle = objectnet.base_classes[objectnet.class_names.index("bicycle")]
    assert [imagenet.class_names[n] for n in bicycle] == ["mountain bike", "tandem bicycle"]
    whale = registry.get("imagenet_vid").base_classes[28]
    assert [imagenet.class_names[n] for n in whale] == ["grey whale", "killer whale"]
    youtube = registry.get("youtube_bb")
    without = [n for n, base in zip(youtube.class_names, youtube.base_classes) if not base]
    assert without == ["cow", "giraffe", "skateboard", "toilet"]
    assert registry.get("imagenet_sketch").class_names == imagenet.class_names


def test_unknown_names():
    with pytest.raises(UserError, match=r"no data set 'cifar11'.*cifar10, cifar100.*paper27.*path"):
        registry.get("cifar11")
    with pytest.raises(UserError, match="No data set is named"):
        registry.resolve(" , ")


def test_resolve():
    names = [found.name for found in registry.resolve("digits, shifts,imagenet_a,digits")]
    assert names == ["digits", *registry.collections()["shifts"]]


def test_prompt_sets():
    cars = registry.get("cifar100")
    assert cars.prompt_set("paper").class_names[1] == "aquarium fish"
    assert cars.prompt_set("clip_benchmark").class_names[1] == "aquarium_fish"
    assert registry.get("digits").prompt_set("paper").name == "own"
    with pytest.raises(UserError, match="no prompts named 'papers'; it has: paper, clip_benchmark"):
        cars.prompt_set("papers")


def test_classes_without_images():
    labels, names = [(0,), (), (2, 0)], ("a", "b|bee", "c", "d")
    assert dataset.missing_classes(labels, names) == ["b|bee", "d"]
    with pytest.raises(UserError, match=r"2 of 4 classes have no image in the test split: b, d\."):
        dataset.check_classes(labels, names, "the test split")
    dataset.check_classes([*labels, (1, 3)], names, "the test split")


def test_packaged_files_suffice():
    """All data files are installed with the package."""
    wanted = '"clip_jax.evaluate.sets" = ["definitions/*"'
    assert wanted in (ROOT / "pyproject.toml").read_text()
    definitions = ROOT / "clip_jax/evaluate/sets/definitions"
    licences = {path.name for path in definitions.glob("LICENSE*")}
    named = {
        word.strip("(),.")
        for n in registry.names()
        for s in registry.get(n).sources
        for word in s.split()
        if "LICENSE" in word
    }
    assert named == licences


def test_neither_tensorflow_nor_jax_is_loaded():
    code = (
        "import sys; from clip_jax.evaluate.sets import finding, registry\n"
        "digits, pets = registry.resolve('digits,oxford_pets')\n"
        "finding.open_split(digits, 'test', '', image_size=16)[0]\n"
        "try: finding.open_split(pets, 'test', '/nowhere', image_size=16)\n"
        "except finding.NotOnDisk: sys.exit('jax' in sys.modules or 'tensorflow' in sys.modules)"
    )
    environment = {"TFDS_DATA_DIR": "/nowhere", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0
