"""CONTRIBUTING.md: what its walk-throughs say is done in a copy of the repository, and works."""

import json
import pathlib
import zipfile

import pytest
import tiny_sets
import walkthrough

from clip_jax.data.sources import digits

TITLES = ("A new loss", "A new data format", "A new evaluation set")
CLASSES = {"robin": 0, "wren": 1, "blue tit": 2}  # and the digit that stands for each


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> pathlib.Path:
    """A copy with the changes of all three, which must not get in each other's way."""
    folder = walkthrough.copy(tmp_path_factory.mktemp("contributing"))
    for title in TITLES:
        for block in walkthrough.blocks(title):
            walkthrough.apply(block, folder)
    return folder


def test_the_tests_that_it_shows(copy: pathlib.Path):
    """And those that it names, on what it adds."""
    files = ["losses/test_losses.py", "data/test_sources.py", "evaluate/test_registry.py"]
    wanted = "test_hinge or test_zip or test_every_set_is_sound[garden_birds]"
    files = [f"tests/{name}" for name in files]
    said = walkthrough.run(
        ["-m", "pytest", *files, "-k", wanted, "-o", "addopts=", "-p", "no:cacheprovider"], copy
    )
    assert "7 passed" in said  # the loss on 5 meshes


@pytest.mark.slow
def test_what_it_says_to_try(copy: pathlib.Path):
    scenes = digits.DigitScenes("train_scans", image_size=32, seed=0)
    with zipfile.ZipFile(copy / "pictures.zip", "w") as archive:
        for index in range(64):
            image = tiny_sets.Image.fromarray(scenes[index].image)
            archive.writestr(f"{index}.jpg", tiny_sets.encoded(image, "JPEG"))
            archive.writestr(f"{index}.txt", scenes[index].text)
    for name, digit in CLASSES.items():
        folder = copy / "sets" / "garden_birds" / "test" / name
        folder.mkdir(parents=True)
        shown = [image for image, label in tiny_sets.digits(100) if label == digit]
        for index, image in enumerate(shown):
            image.save(folder / f"{index}.png")

    losses = {}
    walkthrough.try_it(TITLES[0], copy, "--config.log.every=1 steps")
    walkthrough.try_it(TITLES[1], copy)
    for run in ("hinge", "zip"):
        rows = (copy / "runs" / run / "metrics.jsonl").read_text().splitlines()
        losses[run] = [row["train/loss"] for row in map(json.loads, rows) if "train/loss" in row]
    # Two unrelated unit vectors are 0.2 too near twice a pair; softmax begins at ln 32 nats.
    assert 0.3 < losses["hinge"][0] < 0.5
    assert losses["hinge"][-1] < losses["hinge"][0]
    assert 3 < losses["zip"][0] < 4
    config = json.loads((copy / "runs" / "zip" / "config.json").read_text())
    assert config["data"]["source"]["type"] == "zip"
    said = walkthrough.try_it(TITLES[2], copy)
    assert "Birds of a garden" in said
    assert "mean per class" in said


@pytest.mark.parametrize("title", TITLES)
def test_it_names_few_places(title: str):
    """A walkthrough touches three files at most, so that a stranger finds them."""
    touched = {
        line.removeprefix("+++ ").removeprefix("# ")
        for block in walkthrough.blocks(title)
        for line in block.text.splitlines()
        if line.startswith(("+++ ", "# clip_jax/", "# tests/"))
    }
    assert len(touched) <= 3
