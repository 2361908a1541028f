"""Starting from another run's model, at the same or another resolution."""

import pathlib

import jax
import numpy as np
import pytest
import tiny_run

import clip_jax
from clip_jax import train
from clip_jax.errors import UserError
from clip_jax.models.resize import image_positions, resize_positions


def cubic_weights(old: int, new: int) -> np.ndarray:
    """Keys' cubic (a = -1/2) from `old` to `new` >= `old` samples, float64 [new, old]."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    x = np.abs(centres[:, None] - np.arange(old))
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x <= 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)  # what lies beyond the edge is left out


def resized(positions: np.ndarray, new: int) -> np.ndarray:
    """Reference of `resize_positions`: [1 + old * old, w] -> [1 + new * new, w]."""
    old = round((len(positions) - 1) ** 0.5)
    grid = np.asarray(positions[1:], np.float64).reshape(old, old, -1)
    weights = cubic_weights(old, new)
    grid = np.einsum("ai,bj,ijw->abw", weights, weights, grid).reshape(new * new, -1)
    return np.concatenate([positions[:1], grid])


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


def test_a_model_of_another_shape_is_refused(tmp_path):
    with pytest.raises(UserError, match="only image_size may differ: it has embed_dim 16, not 8"):
        start_from_finished(tmp_path / "run", {"model.size.embed_dim": 8})


def test_a_relative_workdir(tmp_path, monkeypatch):
    """The default one, runs/NAME, is relative; it is saved to, resumed from and loaded."""
    monkeypatch.chdir(tmp_path)
    start_from_finished(pathlib.Path("runs/tiny"), {})
    start_from_finished(pathlib.Path("runs/tiny"), {})
    assert (tmp_path / "runs/tiny/checkpoints/1").is_dir()
    assert clip_jax.load("runs/tiny").encode_text("a seven").shape == (1, 16)
