"""Whole runs of what figure 2 compares with CLIP: trained, resumed, evaluated, loaded, refused."""

import csv
import functools
import json
import pathlib
import shutil

import numpy as np
import pytest
import tiny_run

import clip_jax
from clip_jax import weights
from clip_jax.__main__ import main
from clip_jax.common.metrics import read_history
from clip_jax.errors import UserError
from clip_jax.training import train

pytestmark = pytest.mark.slow

OBJECTIVES = ("captioning", "bag_of_words")  # the two baselines


@pytest.fixture(scope="module", autouse=True)
def _compile_once():
    with tiny_run.compile_once():
        yield


def config(objective: str, **overrides):
    settings = {"objective": objective, "duration": "6 steps", "checkpoint.every": "3 steps"}
    settings["eval.zeroshot.templates"] = ("the digit {}",)
    return tiny_run.config({**settings, **overrides})


@functools.cache
def finished(objective: str) -> pathlib.Path:
    """The workdir of a short run; to be read or copied, not changed."""
    workdir = tiny_run.folder() / objective
    train.train(config(objective), workdir)
    return workdir


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run(objective: str, capsys):
    workdir = finished(objective)
    rows = read_history(workdir)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert abs(losses[0] - np.log(49_408)) < 1
    assert losses[-1] < losses[0] - 0.1
    assert not any("train/logit_scale" in row for row in rows)
    evaluated = [row for row in rows if "zeroshot/top1" in row]
    assert [(row["step"], row["eval/images_seen"]) for row in evaluated] == [(6, 96)]
    page = (workdir / "report.html").read_text()
    assert "are the most likely to the model" in page
    meta = json.loads((workdir / "checkpoints/6/meta/metadata").read_text())
    assert meta["size"]["objective"] == objective


def test_a_run_of_the_detector(capsys):
    workdir = finished("near_duplicates")
    said = capsys.readouterr().out
    assert said.count("No zero-shot evaluation: a model trained for near_duplicates") == 1
    rows = read_history(workdir)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    found = {row["step"]: row for row in rows if "near_duplicates/recall@1" in row}
    assert list(found) == [6]
    assert 0.01 < found[6]["near_duplicates/recall@1"] <= 1  # of 100 images
    assert "near duplicates" in (workdir / "report.html").read_text()


def test_the_detector_embeds_images_alone(tmp_path):
    model = clip_jax.load(finished("near_duplicates"))
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), np.uint8)
    np.testing.assert_allclose(np.linalg.norm(model.encode_image(images), axis=1), 1, rtol=1e-5)
    for call in (model.encode_text, lambda text: model.zero_shot(images, [text])):
        with pytest.raises(UserError, match=r"trained for near_duplicates.*no texts"):
            call("a seven")
    out = tmp_path / "embedded"
    main(["embed", "digits:test", f"--model={finished('near_duplicates')}", f"--out={out}"])
    assert list(out.glob("part-*.parquet"))


def test_what_cannot_be_evaluated_is_said_once(tmp_path, capsys):
    copy = shutil.copytree(finished("bag_of_words"), tmp_path / "copy")
    final = train.train(config("bag_of_words"), copy)
    said = capsys.readouterr().out
    assert said.count("No retrieval evaluation: a model trained for bag_of_words") == 1
    assert "(bag_of_words): " in said
    assert "zeroshot/top1" in final
    assert not any(name.startswith("retrieval/") for name in final)


def test_resuming_ends_in_the_same_numbers(tmp_path):
    whole = finished("captioning")
    copy = shutil.copytree(whole, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints/6")
    train.train(config("captioning", accum_steps=1), copy)
    for one, other in zip(read_history(copy), read_history(whole), strict=True):
        for name in ("train/loss", "zeroshot/top1", "eval/images_seen"):
            assert one.get(name) == other.get(name)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_using_the_result(objective: str, tmp_path):
    model = clip_jax.load(finished(objective))
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), np.uint8)
    embeds = model.encode_image(images)
    np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, rtol=1e-5)
    classes = model.zero_shot(images, ["seven|7", "three"], ["the digit {}", "a {}"])
    assert classes.shape == (3, 2)
    np.testing.assert_allclose(classes.sum(axis=1), 1, rtol=1e-5)
    with pytest.raises(UserError, match=rf"trained for {objective}.*objective=contrastive"):
        model.encode_text("a seven")
    # A copy is the same model.
    found = weights.open(finished(objective))
    weights.save(found, tmp_path / "copied")
    copied = clip_jax.load(tmp_path / "copied")
    np.testing.assert_array_equal(copied.encode_image(images), embeds)
    assert objective in repr(copied)


def test_evaluate_says_what_a_model_cannot_do(tmp_path, capsys):
    """Tasks on models that embed no texts; overlap, by the detector."""

    def evaluate(objective: str, *arguments: str) -> dict:
        out = tmp_path / objective
        run = f"--checkpoint={finished(objective)}"
        main(["evaluate", run, f"--out={out}", "--datasets=digits,digits_scenes", *arguments])
        with (out / "results.csv").open() as file:
            rows = list(csv.DictReader(file))
        return {(row["task"], row["variant"], row["metric"]): float(row["value"]) for row in rows}

    detector = f"--detector={finished('near_duplicates')}"
    found = evaluate(
        "bag_of_words", "--tasks=zeroshot,retrieval,overlap", "--train_data=digits:test", detector
    )
    assert {task for task, *_ in found} == {"zeroshot", "overlap"}
    assert "Task retrieval is skipped" in capsys.readouterr().out
    accuracy = found["zeroshot", "ensemble", "accuracy"]
    assert found["overlap", "all", "accuracy"] == accuracy
    assert found["overlap", "overlap", "share of images"] == 1  # each image has itself

    found = evaluate("near_duplicates", "--tasks=zeroshot,linear_probe")
    assert {task for task, *_ in found} == {"linear_probe"}
    assert found["linear_probe", "linear probe", "accuracy"] > 0.5
    assert "Task zeroshot is skipped" in capsys.readouterr().out


@pytest.mark.parametrize("to", ["openai", "open_clip", "huggingface", "big_vision"])
def test_no_other_format_has_such_models(to: str, tmp_path):
    target = tmp_path / {"openai": "out.pt", "big_vision": "out.npz"}.get(to, "out")
    with pytest.raises(UserError, match=rf"{to} has no such model.*--to=clip_jax"):
        weights.save(weights.open(finished("captioning")), target, to)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["export", "--license=mit", "--out=OUT", "--model=RUN"], "trained for captioning"),
        (["card", "--license=mit", "--out=OUT", "--model=RUN"], "trained for captioning"),
        (["embed", "digits:test", "--of=texts", "--out=OUT", "--model=RUN"], "--of=images"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_commands_that_need_a_text_tower(command: list, message: str, tmp_path, capsys):
    places = {"--out=OUT": f"--out={tmp_path / 'out'}", "--model=RUN": "--model="}
    places["--model=RUN"] += str(finished("captioning"))
    with pytest.raises(SystemExit):
        main([places.get(word, word) for word in command])
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_starting_from_another_objective(tmp_path):
    settings = config("bag_of_words", init_from=str(finished("captioning")))
    with pytest.raises(UserError, match="objective 'captioning', not 'bag_of_words'"):
        train.train(settings, tmp_path)
