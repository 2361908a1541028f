"""Starting from another run's model or published weights, at the same or another resolution."""

import pathlib
import re

import jax
import numpy as np
import pytest
import tiny_run
import tiny_weights
from reference import resized
from tiny_tokenizer import write_tokenizer

import clip_jax
from clip_jax import weights
from clip_jax.configs import siglip_b16
from clip_jax.errors import UserError
from clip_jax.models.resize import image_positions, resize_positions
from clip_jax.training import train
from clip_jax.weights.convert import cli

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("path", [("positions",), ("attention_pool", "positions")])
@pytest.mark.parametrize(("old", "new"), [(2, 3), (4, 7), (3, 3)])
def test_positions_are_interpolated(path, old, new):
    positions = np.random.default_rng(0).normal(size=(1 + old * old, 8)).astype(np.float32)
    tower: dict = {path[-1]: positions, "other": np.ones(3)}
    if len(path) == 2:
        tower = {path[0]: tower}
    params = resize_positions({"image": tower, "text": {"positions": np.ones((5, 8))}}, 1 + new**2)
    np.testing.assert_allclose(image_positions(params), resized(positions, new), atol=1e-6)
    np.testing.assert_array_equal(params["text"]["positions"], np.ones((5, 8)))


def start_from_finished(workdir: pathlib.Path, overrides: dict) -> None:
    """One step at learning rate zero: what it saves is what it started from."""
    settings = {"init_from": str(tiny_run.finished()), "optim.learning_rate": 0.0}
    settings |= {"duration": "1 steps", "eval.zeroshot.source.type": ""}
    settings |= {"eval.retrieval.source.type": "", "checkpoint.best_metric": ""}
    train.train(tiny_run.config({**settings, **overrides}), workdir)


@pytest.mark.parametrize("image_size", [16, 32])
def test_a_run_starts_from_the_model_of_another(tmp_path, image_size):
    start_from_finished(tmp_path / "run", {"model.size.image_size": image_size})
    source = clip_jax.load(tiny_run.finished()).variables["params"]
    ours = clip_jax.load(tmp_path / "run").variables["params"]
    wanted = resized(np.asarray(image_positions(source)), image_size // 8)
    np.testing.assert_allclose(image_positions(ours), wanted, atol=1e-6)
    ours["image"]["positions"] = source["image"]["positions"]
    jax.tree.map(np.testing.assert_array_equal, ours, source)


def test_one_tower_of_another_model(tmp_path):
    """LiT takes and freezes the image tower; its text tower is another one, at random."""
    changes = {"init_params": "^image/", "model.size.text_width": 16, "optim.factors": "^image/=0"}
    start_from_finished(tmp_path / "run", changes | {"optim.learning_rate": 0.1})
    source = clip_jax.load(tiny_run.finished()).variables["params"]
    ours = clip_jax.load(tmp_path / "run").variables["params"]
    jax.tree.map(np.testing.assert_array_equal, ours["image"], source["image"])
    assert ours["text"]["positions"].shape == (24, 16)
    for changes, message in (
        ({"init_params": "^text/", "model.size.text_width": 16}, "it has text_width 32, not 16"),
        ({"init_params": "^img/"}, r"init_params '\^img/' finds no parameter"),
    ):
        with pytest.raises(UserError, match=message):
            start_from_finished(tmp_path / "other", changes)


def test_a_model_of_another_shape_is_refused(tmp_path):
    with pytest.raises(UserError, match="context_length may differ: it has embed_dim 16, not 8"):
        start_from_finished(tmp_path / "run", {"model.size.embed_dim": 8})


def test_a_relative_workdir(tmp_path, monkeypatch):
    """The default one, runs/NAME, is relative; it is saved to, resumed from and loaded."""
    monkeypatch.chdir(tmp_path)
    start_from_finished(pathlib.Path("runs/tiny"), {})
    start_from_finished(pathlib.Path("runs/tiny"), {})
    assert (tmp_path / "runs/tiny/checkpoints/1").is_dir()
    assert clip_jax.load("runs/tiny").encode_text("a seven").shape == (1, 16)


# ---- SigLIP, from a folder of transformers -----------------------------------------------------


@pytest.fixture
def siglip(tmp_path: pathlib.Path) -> pathlib.Path:
    """A tiny one, its tokenizer beside it."""
    folder = tmp_path / "siglip"
    weights.save(tiny_weights.make("siglip"), folder, "huggingface")
    write_tokenizer(folder / "spiece.model")
    return folder


def siglip_config(folder: pathlib.Path, *flags: str, **settings):
    """configs/siglip_b16.py:smoke in the shape of `tiny_weights`; flags as on a command line."""
    config = siglip_b16.get_config("smoke")
    shape = {"embed_dim": 64, "text_heads": 1, "context_length": 10}
    settings |= {f"model.size.{name}": value for name, value in shape.items()}
    settings |= {"init_from": str(folder), "optim.learning_rate": 0.0, "model.remat": "none"}
    settings |= {"eval.zeroshot.source.type": "", "checkpoint.best_metric": "", "batch_size": 8}
    settings |= {"eval.retrieval.source.type": "", "mesh.zero1": False, "log.tensorboard": False}
    for flag in flags:
        name, _, value = flag.removeprefix("--config.").partition("=")
        settings[name] = int(value) if value.isdecimal() else value
    config.update_from_flattened_dict(settings)
    return config


def test_what_to_set_for_a_siglip_folder_is_said(siglip, tmp_path):
    """And with that it trains, resumes and is converted back, tokenizer included."""
    with pytest.raises(
        UserError, match=r"vocab_size 60, not 49408; the tokenizer huggingface:"
    ) as error:
        train.train(siglip_config(siglip, duration="1 steps"), tmp_path / "run")
    flags = re.findall(r"--config\.\S+[^.\s]", str(error.value))
    wanted = f"--config.tokenizer=huggingface:{siglip}"
    assert flags == ["--config.model.size.vocab_size=60", wanted]

    longer = {"duration": "2 steps", "checkpoint.allow_config_change": True}
    with tiny_run.compile_once():
        train.train(siglip_config(siglip, *flags, duration="1 steps"), tmp_path / "run")
        (siglip / "model.safetensors").unlink()  # needed to start, not to resume
        train.train(siglip_config(siglip, *flags, **longer), tmp_path / "run")
    assert (tmp_path / "run/checkpoints/2").is_dir()
    weights.save(weights.open(tmp_path / "run"), tmp_path / "back", "huggingface")
    ours, back = tiny_weights.make("siglip"), weights.open(tmp_path / "back")
    assert back.size == ours.size
    for name in ours.tensors.shapes:
        np.testing.assert_array_equal(back.tensors.read(name), ours.tensors.read(name), name)
    texts = ["a cat", "cats"]
    rows = clip_jax.load(tmp_path / "run").tokenizer(texts)
    np.testing.assert_array_equal(clip_jax.load(tmp_path / "back").tokenizer(texts), rows)
    np.testing.assert_array_equal(rows[0, :3], [3, 4, 1])


def test_a_clip_model_cannot_read_the_ids_of_siglip(siglip, tmp_path):
    settings = {"tokenizer": f"siglip:{siglip}/spiece.model", "model.size.vocab_size": 9}
    with pytest.raises(UserError, match=r"largest id, which SigLIP's end token is not"):
        train.train(tiny_run.config(settings), tmp_path / "run")


def test_another_length_of_captions(tmp_path):
    """The positions of the text tower are interpolated, as `convert` does it."""
    target = str(tmp_path / "short")
    cli.main([str(tiny_run.finished()), target, "--context_length=9"])
    start_from_finished(tmp_path / "run", {"model.size.context_length": 9})
    run, short = (clip_jax.load(path).variables["params"] for path in (tmp_path / "run", target))
    assert run["text"]["positions"].shape[0] == 9
    jax.tree.map(np.testing.assert_array_equal, run, short)
