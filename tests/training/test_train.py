"""Whole runs: what they leave behind, how they resume, and how they refuse."""

import collections
import functools
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import html_page
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
import xla_flags
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from clip_jax.common import metrics
from clip_jax.errors import UserError
from clip_jax.training import train
from configs import default

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _compile_once():
    with tiny_run.compile_once():
        yield


@pytest.fixture
def copy(tmp_path) -> pathlib.Path:
    """A copy of the finished run that a test may change."""
    return shutil.copytree(tiny_run.finished(), tmp_path / "copy")


def steps_kept(workdir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


# What a run leaves behind


def test_metrics_of_a_run():
    found = tiny_run.read_metrics(tiny_run.finished())
    by_name = collections.defaultdict(list)
    for step, name in found:
        by_name[name].append(step)
    every = list(range(1, 13))
    trained = ["loss", "logit_scale", "learning_rate", "alignment", "uniformity/text"]
    trained += ["grad_norm", "param_norm", "param_norm/image", "images_per_second_per_chip"]
    for name in trained:
        assert by_name[f"train/{name}"] == every
    assert by_name["train/images_per_second"] == by_name["data/skipped"] == every
    assert by_name["host/memory_gib"] == every
    for name in ("zeroshot/top1", "zeroshot/top5", "retrieval/text_to_image/recall@10"):
        assert by_name[name] == [6, 12]
    losses = [found[step, "train/loss"] for step in every]
    assert np.isfinite(losses).all()
    assert np.log(16) - 1 < losses[0] < np.log(16) + 2  # near that of a guess among 16
    # Warm-up over 3 steps to 1e-3, then a cosine to zero at the end.
    rates = [found[step, "train/learning_rate"] for step in every]
    cosine = [0.5 * (1 + np.cos(np.pi * i / 9)) for i in range(9)]
    np.testing.assert_allclose(rates, 1e-3 * np.array([1 / 3, 2 / 3, 1, *cosine]), rtol=1e-5)
    np.testing.assert_allclose(found[1, "train/logit_scale"], 1 / 0.07, rtol=1e-3)


def test_tensorboard_holds_the_same_numbers():
    workdir = tiny_run.finished()
    events = EventAccumulator(str(workdir / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    shown = {
        (event.step, name): float(tensor_util.make_ndarray(event.tensor_proto))
        for name in events.Tags()["tensors"]
        for event in events.Tensors(name)
    }
    found = tiny_run.read_metrics(workdir)
    assert {key: np.float32(value) for key, value in found.items()} == shown


def test_config_and_checkpoints_of_a_run():
    workdir = tiny_run.finished()
    stored = json.loads((workdir / "config.json").read_text())
    assert stored == json.loads(tiny_run.config().to_json_best_effort())
    assert stored["batch_size"] == 16
    assert steps_kept(workdir) == [6, 8, 12]  # 6 was the best so far
    meta = json.loads((workdir / "checkpoints/12/meta/metadata").read_text())
    assert meta["config"] == stored
    assert (meta["step"], meta["examples_seen"]) == (12, 12 * 16)
    assert meta["tokenizer"].startswith("openai-bpe:")
    assert meta["size"]["image_layers"] == [1]


def test_report_of_a_run():
    page = (tiny_run.finished() / "report.html").read_text()
    said = html_page.text_of(page)
    assert "python main.py --config=tiny" in said
    assert "8 x cpu" in said
    assert f"{tiny_run.read_metrics(tiny_run.finished())[12, 'zeroshot/top1']:.1%}" in said.replace(
        " %", "%"
    )
    assert "data:image/png;base64," in page
    assert not re.search(r"(src|href)=.https?:", page)  # readable offline


# Resuming

KILLED = """
import os, runpy, signal, sys
from clip_jax.common import metrics

def write(self, step, values, write=metrics.MetricWriter.write):
    if step < 9:
        return write(self, step, values)
    with self._path.open("a") as file:
        file.write('{"step": 9, "train/lo')
    os.kill(os.getpid(), signal.SIGKILL)

metrics.MetricWriter.write = write
sys.argv[0] = "main.py"
runpy.run_path("main.py", run_name="__main__")
"""


def flags() -> list[str]:
    return [f"--config.{name}={value}" for name, value in tiny_run.SETTINGS.items()]


def test_a_killed_run_resumes_to_the_bit(tmp_path, capsys):
    command = [sys.executable, "-c", KILLED, "--config=configs/vit_b32.py:smoke", *flags()]
    killed = subprocess.run(
        [*command, f"--workdir={tmp_path}"],
        cwd=ROOT,
        env=xla_flags.environment(8),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with pytest.raises(json.JSONDecodeError):
        tiny_run.read_rows(tmp_path)  # the last line was cut short
    assert max(row["step"] for row in metrics.read_history(tmp_path)) == 8
    assert not (tmp_path / "report.html").exists()
    train.train(tiny_run.config(), tmp_path)
    # The save at step 8 was perhaps still under way, the one at step 6 was not.
    assert re.search(r"Resuming .* from step [68]\.", capsys.readouterr().out)
    whole = tiny_run.finished()
    assert tiny_run.learned(tmp_path) == tiny_run.learned(whole)
    tiny_run.assert_same_checkpoint(tmp_path, whole, step=12)
    assert (tmp_path / "report.html").exists()


def test_resuming_from_an_earlier_checkpoint(copy, capsys):
    for step in (8, 12):
        shutil.rmtree(copy / "checkpoints" / str(step))
    # Fields that do not change what is learned may differ.
    changes = {"checkpoint.keep": 1, "data.threads": 3, "data.processes": 2}
    config = tiny_run.config({**changes, "log.tensorboard": False})
    final = train.train(config, copy)
    assert "from step 6." in capsys.readouterr().out
    whole = tiny_run.finished()
    assert tiny_run.learned(copy) == tiny_run.learned(whole)
    tiny_run.assert_same_checkpoint(copy, whole, step=12)
    for name, value in final.items():
        assert value == tiny_run.read_metrics(whole)[12, name]
    assert steps_kept(copy) == [12]  # the latest, and the only one that was evaluated


def test_a_run_from_before_settings_were_renamed_resumes(copy, capsys):
    """Its config.json has the old names; their values are compared under the new ones."""
    shutil.rmtree(copy / "checkpoints" / "12")
    file = copy / "config.json"
    stored = json.loads(file.read_text())
    for old, new in default.RENAMED.items():
        (*groups, name), (*old_groups, old_name) = new.split("."), old.split(".")
        value = functools.reduce(dict.__getitem__, groups, stored).pop(name)
        inner = functools.reduce(lambda tree, key: tree.setdefault(key, {}), old_groups, stored)
        inner[old_name] = value
    del stored["model"]["packing"]  # empty by now
    del stored["data"]["captions"]  # as before there was such a setting
    file.write_text(json.dumps(stored))
    assert {"half_weights"} == stored["optim"].keys() - tiny_run.config().optim.keys()
    with pytest.raises(UserError, match=r"optim\.bf16_params was '', now '\^text/'"):
        train.train(tiny_run.config({"optim.bf16_params": "^text/"}), copy)
    train.train(tiny_run.config(), copy)
    assert "from step 8." in capsys.readouterr().out
    assert tiny_run.learned(copy) == tiny_run.learned(tiny_run.finished())
    assert json.loads(file.read_text()) == json.loads(tiny_run.config().to_json_best_effort())


def test_a_complete_run_only_gets_its_report_again(copy, capsys):
    (copy / "report.html").unlink()
    before = (copy / "metrics.jsonl").read_bytes()
    saved = {path: path.stat().st_mtime_ns for path in (copy / "checkpoints").rglob("*")}
    final = train.train(tiny_run.config(), copy)
    assert (copy / "metrics.jsonl").read_bytes() == before
    assert {p: p.stat().st_mtime_ns for p in (copy / "checkpoints").rglob("*")} == saved
    assert final["zeroshot/top1"] == tiny_run.read_metrics(copy)[12, "zeroshot/top1"]
    # What comes after it tells where the time went.
    old, new = (
        html_page.text_of((workdir / "report.html").read_text().partition('<section id="time">')[0])
        for workdir in (tiny_run.finished(), copy)
    )
    assert re.findall(r"[\d.]+ ?%", new) == re.findall(r"[\d.]+ ?%", old)
    shown = capsys.readouterr().out
    assert f"The run in {copy} is finished, at step 12" in shown
    assert "ETA" not in shown
    assert "Compiled" not in shown


def test_a_workdir_of_another_run_is_left_alone(copy):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    other = tiny_run.config({"optim.learning_rate": 3e-3, "model.size.text_layers": 2})
    with pytest.raises(UserError) as caught:
        train.train(other, copy)
    said = str(caught.value)
    assert "optim.learning_rate was 0.001, now 0.003" in said
    assert "model.size.text_layers was 1, now 2" in said
    assert "batch_size" not in said
    assert "allow_config_change" in said
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_going_on_with_other_settings_on_demand(copy, capsys):
    changes = {"duration": "14 steps", "checkpoint.allow_config_change": True}
    train.train(tiny_run.config(changes), copy)
    assert "from step 12." in capsys.readouterr().out
    found = tiny_run.read_metrics(copy)
    assert [step for step, name in found if name == "train/loss"] == list(range(1, 15))
    assert json.loads((copy / "config.json").read_text())["duration"] == "14 steps"
    assert steps_kept(copy)[-1] == 14


# What stops a run


def test_a_loss_that_is_not_a_number_ends_the_run(tmp_path, monkeypatch):
    compile_step = train._compile

    def broken(*args):
        step_fn = compile_step(*args)

        class Step:
            def __call__(self, state, batch):
                state, values = step_fn(state, batch)
                if int(state.step) == 6:
                    values = {**values, "loss": jnp.float32(np.nan)}
                return state, values

        return Step()

    monkeypatch.setattr(train, "_compile", broken)
    with pytest.raises(UserError, match=r"loss is nan at step 6.*learning_rate") as caught:
        train.train(tiny_run.config(), tmp_path)
    assert "--workdir" in str(caught.value)
    assert max(row["step"] for row in tiny_run.read_rows(tmp_path)) == 5
    assert steps_kept(tmp_path) == [4]


@pytest.mark.slow
def test_a_step_beyond_the_memory_is_refused_before_it_is_tried(tmp_path):
    changes = {"batch_size": 50_000, "model.size.image_size": 2048, "model.size.patch_size": 256}
    with pytest.raises(UserError, match=r"batch_size 50,000 needs [\d,.]+ GiB") as caught:
        train.train(tiny_run.config(changes), tmp_path)
    needed, has = (
        float(number.replace(",", "")) for number in re.findall(r"([\d,.]+) GiB", str(caught.value))
    )
    images = 50_000 * 2048 * 2048 * 3 / 2**30
    assert needed > max(images, has)
    assert "smaller --config.batch_size" in str(caught.value)
    # Or the remedy would be refused as another run's config.
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 20}, r"batch_size 20 .* 8 devices.*--config\.batch_size=16"),
        ({"batch_size": 3}, r"batch_size 3 .* 8 devices.*--config\.batch_size=8"),
        ({"mesh.fsdp": 3}, r"8 device.*mesh\.slices x fsdp x tensor be one of: 1, 2, 4, 8"),
        ({"model.name": "ViT-B/33"}, r"'ViT-B/33'.*ViT-B/32"),
        ({"model.size.image_width": 33}, r"33.*multiple of image_heads"),
        ({"tokenizer": "latin"}, r"'latin'.*openai"),
        ({"tokenizer": "nowhere.model"}, r"nowhere\.model"),
        ({"model.size.vocab_size": 100}, r"49408.*100.*model\.size\.vocab_size=49408"),
        ({"duration": "12 parsecs"}, r"12 parsecs.*steps, examples, epochs"),
        ({"duration": "0 steps"}, r"nothing to train"),
        ({"duration": "5 percent"}, r"percent"),
        ({"model.remat": "sometimes"}, r"sometimes"),
        ({"data.source.split": "tset"}, r"'tset'.*test"),
        ({"data.source.type": "parquet"}, r"'parquet'.* tar,"),
        ({"data.source.type": "tar", "data.source.path": "nowhere/*.tar"}, r"nowhere/\*\.tar"),
        ({"data.source.type": "folder", "data.source.path": "nowhere"}, r"'nowhere'"),
        ({"eval.retrieval.source.split": "tset"}, r"'tset'"),
        ({"eval.zeroshot.templates": ("a photo",)}, r"'a photo'"),
    ],
    ids=lambda value: ",".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_wrong_settings_fail_before_anything_slow(changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "_compile", lambda *_: pytest.fail("compiled"))
    with pytest.raises(UserError, match=message):
        train.train(tiny_run.config(changes), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_an_unknown_form_of_the_loss(tmp_path):
    with pytest.raises(UserError, match=r"'guess'.*all_gather"):
        train.train(tiny_run.config({"loss.method": "guess"}), tmp_path)


@pytest.mark.slow
def test_a_resnet_on_the_command_line(tmp_path):
    """configs/rn50.py:smoke on one device, as a user runs it."""
    command = [sys.executable, "main.py", "--config=configs/rn50.py:smoke"]
    command += ["--config.duration=4 steps", "--config.batch_size=16", f"--workdir={tmp_path}"]
    command += ["--config.eval.retrieval.max_examples=50"]
    ran = subprocess.run(
        command,
        cwd=ROOT,
        env=xla_flags.environment(1),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    assert "ResNet of 1-1-1-1" in ran.stdout
    assert "on 1 x cpu" in ran.stdout
    found = tiny_run.read_metrics(tmp_path)
    assert np.isfinite(found[4, "train/loss"])
    assert 0 <= found[4, "zeroshot/top1"] <= 1
    statistics = [path for path in tiny_run.read_checkpoint(tmp_path, 4) if "batch_stats" in path]
    assert len(statistics) > 10
    assert "--config=configs/rn50.py:smoke" in html_page.text_of(
        (tmp_path / "report.html").read_text()
    )
