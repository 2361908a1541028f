"""Runs on tar shards and folders: what cannot be used is counted, or ends the run."""

import io
import pathlib
import re
import tarfile

import html_page
import numpy as np
import pytest
import tiny_run
from PIL import Image

from clip_jax.errors import UserError
from clip_jax.training import train


@pytest.fixture(scope="module", autouse=True)
def _compile_once():
    with tiny_run.compile_once():
        yield


COLOURS = {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200)}


def encoded(colour: str, suffix: str, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 50, (20, 24, 3)) + np.array(COLOURS[colour])
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, {"jpg": "JPEG"}.get(suffix, suffix))
    return file.getvalue()


def pairs() -> dict[str, bytes]:
    """Files of 24 good pairs, of one broken image, one empty caption and one too long."""
    files = {}
    for i in range(24):
        colour, suffix = list(COLOURS)[i % 3], ("png", "jpg")[i % 2]
        files[f"{i:03}.{suffix}"] = encoded(colour, suffix, i)
        files[f"{i:03}.txt"] = f"a {colour} picture, number {i}".encode()
    good = encoded("red", "png", 99)
    files |= {"100.png": good[:60], "100.txt": b"a broken picture"}
    files |= {"101.png": good, "101.txt": b" \n"}
    files |= {"102.png": good, "102.txt": b"red " * 40}
    return files


@pytest.fixture(scope="module", params=["tar", "folder"])
def stored(request, tmp_path_factory) -> dict:
    """The settings of a run on stored data, in either form."""
    root = tmp_path_factory.mktemp(request.param)
    for name, content in pairs().items():
        (root / name).write_bytes(content)
    path = str(root)
    if request.param == "tar":
        names = sorted(pairs())
        for shard, part in enumerate((names[:20], names[20:])):
            with tarfile.open(root / f"{shard:05}.tar", "w") as tar:
                for name in part:
                    tar.add(root / name, name)
        path = f"{root}/{{00000..00001}}.tar"
    classes = root.parent / f"{root.name} classes"
    for seed, colour in enumerate(3 * list(COLOURS)):
        (classes / colour).mkdir(parents=True, exist_ok=True)
        (classes / colour / f"{seed}.png").write_bytes(encoded(colour, "png", 200 + seed))
    return {
        "duration": "8 steps",
        "data.max_skipped": 0.2,
        "data.source.type": request.param,
        "data.source.path": path,
        "data.source.split": "",
        "eval.retrieval.source.type": request.param,
        "eval.retrieval.source.path": path,
        "eval.retrieval.source.split": "",
        "eval.zeroshot.source.type": "folder",
        "eval.zeroshot.source.path": str(classes),
        "eval.zeroshot.source.split": "",
        "eval.zeroshot.templates": ("a {} picture",),
        "checkpoint.every": "8 steps",
    }


@pytest.mark.slow
def test_a_run_on_stored_data_counts_what_it_cannot_use(stored, tmp_path):
    final = train.train(tiny_run.config(stored), tmp_path)
    assert 0 <= final["zeroshot/top1"] <= 1
    assert "zeroshot/top5" not in final  # of 3 classes
    found = tiny_run.read_metrics(tmp_path)
    skipped, truncated = (
        [found[step, f"data/{name}"] for step in range(1, 9)] for name in ("skipped", "truncated")
    )
    assert skipped == sorted(skipped)
    assert truncated == sorted(truncated)
    # 128 places are 4 whole epochs of 27 and 20 places more; the pipeline runs a few epochs ahead.
    assert 4 * 2 <= skipped[-1] <= 10 * 2
    assert 4 <= truncated[-1] <= 12
    said = html_page.text_of((tmp_path / "report.html").read_text())
    for reason in ("unreadable image", "empty caption"):
        assert int(re.search(reason + r" (\d+)", said).group(1)) >= 4
    assert int(re.search(r"(\d+) captions were longer", said).group(1)) >= 4


@pytest.mark.slow
def test_too_many_unusable_examples_end_the_run(stored, tmp_path):
    config = tiny_run.config({**stored, "data.max_skipped": 0.01})
    with pytest.raises(UserError, match=r"data\.max_skipped = 0\.01.*10[01]") as caught:
        train.train(config, tmp_path)
    assert "Repair the data" in str(caught.value)


def empty(folder: pathlib.Path) -> None:
    pass


def without_captions(folder: pathlib.Path) -> None:
    for i in range(3):
        Image.new("RGB", (8, 8)).save(folder / f"{i}.png")


@pytest.mark.parametrize("fill", [empty, without_captions])
def test_folders_without_pairs(fill, tmp_path):
    fill(tmp_path)
    changes = {"data.source.type": "folder", "data.source.path": str(tmp_path)}
    with pytest.raises(UserError, match=re.escape(str(tmp_path)) + r".*no captions.*KEY\.txt"):
        train.train(tiny_run.config(changes), tmp_path / "run")
