"""Folders and files of strangers: names that lead elsewhere, flipped bits, sizes that lie."""

import dataclasses
import json
import os
import pathlib
import stat
import zipfile

import numpy as np
import pytest
import tiny_weights
from PIL import Image
from tiny_tokenizer import write_tokenizer

from clip_jax import api, models, weights
from clip_jax.data import crops
from clip_jax.errors import UserError
from clip_jax.weights import opening
from clip_jax.weights.convert import formats, torch_files


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..", 3, "a\\b"])
def test_a_tokenizer_elsewhere(name, tmp_path: pathlib.Path):
    (tmp_path / "secret").write_text("x")
    weights.save(tiny_weights.make("vit"), tmp_path / "x")
    path = tmp_path / "x" / "clip_jax.json"
    content = json.loads(path.read_text())
    content["tokenizer"] = {"name": "siglip", "identity": "siglip:0", "file": name}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="not inside of it"):
        weights.open(tmp_path / "x")


def test_links_out_of_the_folder(tmp_path: pathlib.Path):
    weights.save(tiny_weights.make("siglip"), tmp_path / "x", "huggingface")
    write_tokenizer(tmp_path / "spiece.model")
    (tmp_path / "x" / "spiece.model").symlink_to(tmp_path / "spiece.model")
    with pytest.raises(UserError, match=r"'spiece.model', which is not inside"):
        weights.open(tmp_path / "x")


def test_a_snapshot_of_the_hub_links_to_its_blobs(tmp_path: pathlib.Path):
    cache = tmp_path / "models--org--name"
    weights.save(tiny_weights.make("vit"), cache / "snapshots" / "abc", "huggingface")
    (cache / "blobs").mkdir()
    for file in (cache / "snapshots" / "abc").iterdir():
        moved = file.rename(cache / "blobs" / file.name)
        file.symlink_to(pathlib.Path("../../blobs") / moved.name)
    tiny_weights.assert_same(weights.open(cache / "snapshots" / "abc"), tiny_weights.make("vit"))


@pytest.mark.parametrize("part", ["../x/model.safetensors", "/tmp/model.safetensors", 4])
def test_an_index_that_names_files_elsewhere(part, tmp_path: pathlib.Path):
    weights.save(tiny_weights.make("vit"), tmp_path / "x", "huggingface")
    (tmp_path / "x" / "model.safetensors").rename(tmp_path / "x" / "moved.safetensors")
    index = tmp_path / "x" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"logit_scale": part}}))
    with pytest.raises(UserError, match=r"not inside of it|no weight_map"):
        weights.open(tmp_path / "x")


@pytest.mark.parametrize("where", [0, 3, 20, 200, 0.3, 0.6, 0.999])
def test_a_flipped_bit(where: float, tmp_path: pathlib.Path):
    weights.save(tiny_weights.make("vit"), tmp_path / "x")
    path = tmp_path / "x" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[int(where if isinstance(where, int) else where * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError):
        weights.save(weights.open(tmp_path / "x"), tmp_path / "y")
    with pytest.raises(UserError):
        api.load(tmp_path / "x")
    assert not (tmp_path / "y").exists()


def test_folders_without_checksums(tmp_path: pathlib.Path):
    weights.save(tiny_weights.make("vit"), tmp_path / "x")
    path = tmp_path / "x" / "clip_jax.json"
    content = json.loads(path.read_text())
    del content["checksums"]
    path.write_text(json.dumps(content))
    tiny_weights.assert_same(weights.open(tmp_path / "x"), tiny_weights.make("vit"))


@pytest.mark.parametrize("to", formats.FORMATS)
def test_modes(to: str, tmp_path: pathlib.Path):
    """All that is written has the mode of an ordinary file."""
    (tmp_path / "ordinary").touch()
    target = tmp_path / f"x{formats.FORMATS[to].suffix}"
    weights.save(tiny_weights.make("siglip" if to == "big_vision" else "vit"), target, to)
    written = [path for path in [target, *target.rglob("*")] if path.is_file()]
    wanted = stat.S_IMODE(os.stat(tmp_path / "ordinary").st_mode)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in written} == {
        path.name: wanted for path in written
    }


# ---- Sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.npz", "x.pt"])
def test_archives_that_inflate(name: str, tmp_path: pathlib.Path):
    member = "img/embedding/kernel.npy" if name == "x.npz" else "archive/data.pkl"
    with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, bytes(2**27))
    assert (tmp_path / name).stat().st_size < 2**18
    with pytest.raises(UserError, match=r"is refused.*claim to hold 134,217,728"):
        weights.open(tmp_path / name, model="ViT-B/32")


def test_settings_that_are_nested_or_no_object(tmp_path: pathlib.Path):
    weights.save(tiny_weights.make("vit"), tmp_path / "x", "open_clip")
    for content in ("[" * 100_000, "[1]", "3"):
        (tmp_path / "x" / "open_clip_config.json").write_text(content)
        with pytest.raises(UserError, match="cannot be read as JSON"):
            weights.open(tmp_path / "x")


def test_dictionaries_that_hold_each_other(monkeypatch):
    monkeypatch.setattr(torch_files, "_MAX_ENTRIES", 1000)
    tree: dict = {}
    for _ in range(60):  # 2**60 entries
        tree = {"a": tree, "b": tree}
    with pytest.raises(UserError, match="more than 1,000 entries"):
        list(torch_files._flat(tree))


# ---- Names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["./x", "../x", "a/b/c", "/x/y", "here/x", "some/model.pt", "some/w.npz", "x"]
)
def test_a_missing_path_is_not_looked_up(name: str, tmp_path: pathlib.Path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(opening, "_download", lambda name: pytest.fail(f"asked for {name}"))
    with pytest.raises(UserError, match=r"There is no model .*looked for at /"):
        weights.open(name)


@pytest.mark.parametrize("name", models.available_models())
def test_a_name_of_an_architecture(name: str, monkeypatch):
    monkeypatch.setattr(opening, "_download", lambda name: pytest.fail(f"asked for {name}"))
    with pytest.raises(UserError, match=r"no weights come with.*(OpenAI's archive|hub)"):
        api.load(name)


# ---- Patches that do not divide the picture ------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "suffix"), [("clip_jax", ""), ("huggingface", ""), ("big_vision", "_38.npz")]
)
def test_the_edge_that_fills_no_patch(name: str, suffix: str, tmp_path: pathlib.Path):
    """The model sees the upper left 35 x 35 of 38 x 38 pixels; the formats keep the 38."""
    size = dataclasses.replace(tiny_weights.SIZES["siglip"], image_size=38, patch_size=7)
    ours = tiny_weights.make("siglip", size)
    weights.save(ours, tmp_path / f"x{suffix}", name)
    opened = weights.open(tmp_path / f"x{suffix}")
    tiny_weights.assert_same(opened, ours)
    model = api.Model.from_weights(opened)
    picture = np.random.default_rng(0).integers(0, 256, (38, 38, 3), np.uint8)
    other = picture.copy()
    other[35:], other[:, 35:] = 0, 0
    np.testing.assert_array_equal(model.encode_image(picture), model.encode_image(other))
    other[34, 34] = 255 - other[34, 34]
    assert np.abs(model.encode_image(picture) - model.encode_image(other)).max() > 1e-6
    with pytest.raises(
        UserError, match=r"image_size=33 is no multiple of the patches of 7.*28 or 35"
    ):
        opened.resized(image_size=33)


def test_filters():
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    image = Image.fromarray(picture)
    for name in ("bilinear", "bicubic", "lanczos"):
        wanted = image.resize((32, 32), Image.Resampling[name.upper()])
        np.testing.assert_array_equal(
            crops.fixed(image, 32, crops.Crop("none", filter=name)), wanted
        )
