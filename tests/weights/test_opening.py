"""Loading what was converted: by path, from a cache of the hub, as the start of a run."""

import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny_run
import tiny_weights
from tiny_tokenizer import write_tokenizer

import clip_jax
from clip_jax import api, checkpoint, sharding, weights
from clip_jax.errors import UserError
from clip_jax.weights.convert import cli


def assert_same_variables(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_a_workdir_there_and_back(tmp_path: pathlib.Path, capsys):
    """The command converts to transformers and back, and another run starts from the result."""
    run = str(tiny_run.finished())
    hub, back = str(tmp_path / "hub"), str(tmp_path / "back")
    cli.main([run, hub, "--to=huggingface"])
    cli.main([hub, back])
    assert "ViT/8 of 1 layers x 32" in capsys.readouterr().out
    expected = clip_jax.load(run)
    model = clip_jax.load(back)
    assert_same_variables(model.variables, expected.variables)
    mesh = sharding.make_mesh(fsdp=8)
    for source in (run, hub, back):
        opened = weights.open(source)
        variables = opened.variables(mesh)
        assert opened.size == expected.net.size
        assert_same_variables(variables, expected.variables)
        assert {leaf.sharding.mesh for leaf in jax.tree.leaves(variables)} == {mesh}
        assert opened.tokenizer.identity == expected.tokenizer.identity
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    np.testing.assert_array_equal(model.encode_image(pictures), expected.encode_image(pictures))
    earlier = weights.open(run, step=8)
    name = "params/text/positions"
    assert not np.array_equal(earlier.tensors.read(name), weights.open(run).tensors.read(name))


def test_a_checkpoint_is_not_read_before_it_is_asked_for(tmp_path: pathlib.Path):
    run = shutil.copytree(tiny_run.finished(), tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "12" / "model")
    opened = weights.open(run)
    assert opened.origin["step"] == 12
    assert opened.size == clip_jax.load(tiny_run.finished()).net.size
    with pytest.raises(UserError, match=r"checkpoints/12 cannot be read.*step 8"):
        opened.variables(sharding.make_mesh(fsdp=8))
    with pytest.raises(UserError, match=r"checkpoints/12 cannot be read.*step 8"):
        weights.save(opened, tmp_path / "copied")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("fsdp", [1, 8])
def test_a_checkpoint_that_diverged(fsdp: int, monkeypatch):
    restore = checkpoint.Checkpoints.restore_variables

    def diverged(store: checkpoint.Checkpoints, step: int, like: dict, ema: bool) -> dict:
        variables = restore(store, step, like, ema)
        scale = variables["params"]["logit_scale"]
        return {**variables, "params": {**variables["params"], "logit_scale": scale * np.nan}}

    monkeypatch.setattr(checkpoint.Checkpoints, "restore_variables", diverged)
    mesh = sharding.make_mesh(fsdp=fsdp, devices=jax.devices()[:fsdp])
    with pytest.raises(UserError, match=r"NaN or infinite, such as params/logit_scale"):
        weights.open(tiny_run.finished()).variables(mesh)


def test_what_was_loaded_is_reported(tmp_path: pathlib.Path):
    weights.save(tiny_weights.make("vit"), tmp_path / "x", "open_clip")
    shown = repr(clip_jax.load(tmp_path / "x"))
    for part in ("ViT/8", "quick_gelu", "open_clip", "32 pixels", "0.4815", "openai-bpe", "10 tok"):
        assert part in shown


def test_siglip_squashes_and_has_its_own_normalisation(tmp_path: pathlib.Path):
    ours = tiny_weights.make("siglip")
    weights.save(ours, tmp_path / "x", "huggingface")
    model = clip_jax.load(tmp_path / "x")
    assert "squashed to 32 x 32" in repr(model)
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, :16] = wide[:, -16:] = 255  # outside of the middle square
    other = model.encode_image(np.zeros((32, 32, 3), np.uint8))
    assert np.abs(model.encode_image(wide) - other).max() > 1e-3
    normalised = np.full((1, 32, 32, 3), -1, np.float32)
    direct = model.net.apply(model.variables, normalised, method="encode_image")
    np.testing.assert_allclose(other, direct, atol=1e-6)
    with pytest.raises(UserError, match=r"without a tokenizer.*--tokenizer"):
        model.encode_text("a cat")


# ---- The hub -----------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: pathlib.Path, monkeypatch) -> pathlib.Path:
    """A cache as huggingface_hub keeps it, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_a_name_of_the_hub_is_found_in_the_cache(hub: pathlib.Path):
    folder, commit = hub / "models--someone--tiny-clip", "0123456789" * 4
    ours = tiny_weights.make("vit")
    weights.save(ours, folder / "snapshots" / commit, "huggingface")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    tiny_weights.assert_same(weights.open("someone/tiny-clip"), ours)
    assert clip_jax.load("someone/tiny-clip").encode_text(["a cat"]).shape == (1, 32)


@pytest.mark.usefixtures("hub")
def test_a_name_that_is_nowhere():
    with pytest.raises(UserError, match=r"no runs/typo here, and no model.*Hugging Face hub"):
        clip_jax.load("runs/typo")


# ---- SigLIP's tokenizer ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.json"])
def test_siglip_tokenizer(name: str, tmp_path: pathlib.Path):
    """Lower case, no punctuation, no start token, ends up to the context; it travels along."""
    weights.save(tiny_weights.make("siglip"), tmp_path / "x", "huggingface")
    write_tokenizer(tmp_path / "x" / name)
    weights.save(weights.open(tmp_path / "x"), tmp_path / "y")
    model = clip_jax.load(tmp_path / "y")
    assert isinstance(model, api.Model)
    assert model.tokenizer is not None
    rows = model.tokenizer(["A  cat, cats!", "a ca_t", ""])
    expected = np.ones((3, 10), np.int32)
    expected[0, :4] = [3, 4, 4, 7]
    expected[1, :2] = [3, 4]
    np.testing.assert_array_equal(rows, expected)
    assert model.tokenizer.decode(rows[0]) == "a cat cats"
    assert [model.tokenizer.is_empty(row) for row in rows] == [False, False, True]
    long, cut = model.tokenizer.encode("cat " * 20)
    np.testing.assert_array_equal(long, [4] * 9 + [1])
    assert cut
    with pytest.raises(ValueError, match="takes 21 ids"):
        model.encode_text("cat " * 20)
    content = (tmp_path / "x" / name).read_bytes()
    (tmp_path / "y" / name).write_bytes(content.replace("▁cat".encode(), "▁dog".encode()))
    with pytest.raises(UserError, match=r"is not the one that tokenizer_rules.json"):
        clip_jax.load(tmp_path / "y")
