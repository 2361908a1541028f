"""The README's examples of training and of using a model, run as they stand."""

import csv
import json
import os
import pathlib
import subprocess
import sys

import markdown_pages
import numpy as np
import pytest
import readme
import tiny_weights
from PIL import Image

from clip_jax import weights
from clip_jax.data.sources import digits


def test_use_the_result(tmp_path: pathlib.Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    readme.prepare(tmp_path)
    rng = np.random.default_rng(0)
    names = {
        "pixels": rng.integers(0, 256, (3, 16, 16, 3), np.uint8),
    }
    for block in readme.blocks("Use the result"):
        if "import transformers" not in block.text:  # see test_parity_readme.py
            readme.run(block, names)
    about_weights = markdown_pages.blocks(markdown_pages.ROOT / "docs" / "weights.md", "Export")
    readme.run(*[block for block in about_weights if block.language == "python"], names)

    model = names["model"]
    assert "quick_gelu" in repr(model)
    np.testing.assert_array_equal(names["image_embeds"], model.encode_image(["a.png", "b.jpg"]))
    np.testing.assert_array_equal(names["text_embeds"], model.encode_text(["a cat", "two dogs"]))
    np.testing.assert_allclose(np.linalg.norm(names["embeds"], axis=1), np.ones(3), rtol=1e-5)
    assert names["image_embed"].shape == names["text_embed"].shape == (2, 512)
    shown = capsys.readouterr().out
    assert "20 examples in 1 part(s) in embeddings" in shown
    by_text, by_picture = shown.split("\nthe digit seven\n")[1].split("\na.png\n")
    assert by_text.count(".png") == 2 * 10  # key and path of each
    assert by_picture.split()[3:5] == ["1.000", "0.png"]  # the same picture
    for name in ("for_transformers/config.json", "exported/README.md"):
        assert (tmp_path / name).is_file()
    run = weights.open("runs/quickstart")
    assert weights.open("for_transformers").size == run.size


OWN = "Train on your own 5,000 pictures"
# On top of the page's commands, so that they take seconds.
SHORT = {"duration": "3 steps", "batch_size": "16", "log.every": "1 steps"}
# The model of tiny_weights.make("vit"), which stands for OpenAI's here.
TINY = tiny_weights.SIZES["vit"]
TINY_FIELDS = ("embed_dim", "image_size", "image_layers", "image_width", "image_heads")
TINY_FIELDS += ("patch_size", "text_layers", "text_width", "text_heads", "context_length")


def write_pictures(folder: pathlib.Path, split: str, header: list[str], count: int) -> None:
    """Scenes with a table of captions."""
    scenes = digits.DigitScenes(split, image_size=48, seed=0)
    folder.mkdir()
    with open(folder / "captions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for index in range(count):
            Image.fromarray(scenes[index].image).save(folder / f"{index:04}.jpg")
            writer.writerow([f"{index:04}.jpg", scenes[index].text])


@pytest.mark.slow
def test_train_on_your_own_pictures(tmp_path: pathlib.Path):
    (table,) = [block for block in readme.blocks(OWN) if block.language == "text"]
    header = table.text.splitlines()[0].split(",")
    write_pictures(tmp_path / "pictures", "train", header, 48)
    write_pictures(tmp_path / "heldout", "test_scenes", header, 16)
    scans = digits.DigitScenes("test", image_size=48, seed=0)
    for index in range(20):
        folder = tmp_path / "test" / ("robin" if index % 2 else "blue_tit")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scans[index].image).save(folder / f"{index}.jpg")
    readme.write_archive(tmp_path / "ViT-B-32.pt")

    blocks = [block for block in readme.blocks(OWN) if block.language == "bash"]
    scratch, published = (markdown_pages.commands(block)[0].words for block in blocks)
    published += [f"--config.model.size.{name}={getattr(TINY, name)}" for name in TINY_FIELDS]
    published += ["--config.model.packing.length=0"]
    for words in (scratch, published):
        assert words[:2] == ["python", "main.py"]
        short = [f"--config.{name}={value}" for name, value in SHORT.items()]
        configs = [word.replace("=configs/", f"={markdown_pages.ROOT}/configs/") for word in words]
        done = subprocess.run(
            [sys.executable, markdown_pages.ROOT / "main.py", *configs[2:], *short],
            cwd=tmp_path,
            env={**os.environ, "XLA_FLAGS": ""},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        (workdir,) = [word.partition("=")[2] for word in words if word.startswith("--workdir=")]
        rows = (tmp_path / workdir / "metrics.jsonl").read_text().splitlines()
        found = {name for row in map(json.loads, rows) for name in row}
        assert "zeroshot/top1" in found
        assert (words is scratch) == ("retrieval/text_to_image/recall@1" in found)
        assert (tmp_path / workdir / "report.html").is_file()
