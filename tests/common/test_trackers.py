"""Rows in Weights & Biases, MLflow and Trackio: each once, in one run, and never in the way."""

import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from clip_jax import choices
from clip_jax.common import metrics, trackers
from clip_jax.configs import vit_b32
from clip_jax.errors import UserError
from clip_jax.training import validation

ROOT = pathlib.Path(__file__).parents[2]
FAKES = ROOT / "tests" / "support" / "fake_trackers"

# One start of a run: tracker, workdir, step resumed, last step, "close" or "kill";
# "back": it has gone back to that step.
START = """
import json, os, pathlib, signal, sys, time
from etils import epath
from clip_jax.common import trackers
if "FAKE_TRACKER_LOG" in os.environ:
    sys.path.insert(0, sys.argv[6])
name, workdir, start, last, how = sys.argv[1:6]
path = pathlib.Path(workdir, "metrics.jsonl")
path.parent.mkdir(exist_ok=True)
rows = path.read_text().splitlines()[: int(start)] if path.exists() else []
sink = trackers.Trackers(
    [name], workdir=epath.Path(workdir), project="test",
    start_step=int(start), went_back=how == "back",
    config={"batch_size": 16, "data.views.scale": [0.5, 1.0]}, hardware="1 x cpu", say=print,
)
for step in range(int(start) + 1, int(last) + 1):
    row = {"train/loss": 1 / step, "retrieval/recall@1": step / 100}
    rows.append(json.dumps({"step": step, **row}))
    path.write_text("".join(row + chr(10) for row in rows))
    sink.write(step, row)
if how == "kill":
    time.sleep(float(os.environ.get("KILL_AFTER", 2)))  # the tracker is at it
    os.kill(os.getpid(), signal.SIGKILL)
sink.close()
"""


def row(step: int) -> dict[str, float]:
    return {"train/loss": 1 / step, "retrieval/recall@1": step / 100}


def open_writer(name: str, workdir: pathlib.Path | epath.Path, start_step: int, say):
    sink = trackers.Trackers(
        [name],
        workdir=epath.Path(workdir),
        project="test",
        start_step=start_step,
        went_back=False,
        config={"batch_size": 16, "data.views.scale": [0.5, 1.0]},
        hardware="1 x cpu",
        say=say,
    )
    writer = metrics.MetricWriter(workdir, tensorboard=False, start_step=start_step, sinks=[sink])
    return writer, sink


def start(name: str, workdir: pathlib.Path, *arguments, **environment) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", START, name, str(workdir), *map(str, arguments), str(FAKES)],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ran.returncode == (-signal.SIGKILL if arguments[-1] == "kill" else 0), ran.stderr
    return ran.stdout


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Reads what the fakes were told."""
    path = tmp_path / "told"
    monkeypatch.setenv("FAKE_TRACKER_LOG", str(path))
    monkeypatch.syspath_prepend(str(FAKES))

    def read(kind: str) -> list[dict]:
        if not path.exists():
            return []
        found = [json.loads(line) for line in path.read_text().splitlines()]
        return [one for one in found if one["kind"] == kind]

    return read


def wait_until(condition) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("name", choices.TRACKERS)
def test_a_killed_run_goes_on_in_the_same_run(name: str, log, tmp_path):
    """Killed after step 20, resumed from 15: rows 16 to 20 are not sent again."""
    workdir = tmp_path / "run"
    said = start(name, workdir, 0, 20, "kill")
    assert "chatter" not in said
    wait_until(lambda: log("end"))  # its process outlives the trainer, to end the run
    start(name, workdir, 15, 30, "close")
    assert [one["step"] for one in log("row")] == list(range(1, 31))
    assert len({one["id"] for one in log("begin") + log("row")}) == 1
    (begun,) = {(one["project"], one["name"]) for one in log("begin")}
    assert begun == ("test", "run")
    config = {key: value for one in log("config") for key, value in one["config"].items()}
    assert config["hardware"] == "1 x cpu"
    assert str(config["batch_size"]) == "16"
    ends = [one["status"] for one in log("end")]
    assert ends == (["KILLED", "FINISHED"] if name != "trackio" else ["FINISHED"] * 2)
    recall = "retrieval/recall_at_1" if name == "mlflow" else "retrieval/recall@1"
    assert log("row")[-1]["metrics"] == {"train/loss": 1 / 30, recall: 0.3}


@pytest.mark.parametrize("name", choices.TRACKERS)
def test_steps_after_a_roll_back_are_sent_again(name: str, log, tmp_path):
    """From step 20 to 15; a later start sends nothing twice."""
    start(name, tmp_path / "run", 0, 20, "close")
    start(name, tmp_path / "run", 15, 22, "back")
    start(name, tmp_path / "run", 18, 24, "close")
    wanted = [*range(1, 21), *range(16, 23), 23, 24]
    assert [one["step"] for one in log("row")] == wanted
    assert len({one["id"] for one in log("row")}) == 1


def test_a_tracker_added_later_gets_the_rows_of_before(log, tmp_path):
    writer = metrics.MetricWriter(tmp_path, tensorboard=False, start_step=0)
    for step in range(1, 11):
        writer.write(step, row(step))
    writer.close()
    writer, _ = open_writer("trackio", tmp_path, 8, print)
    writer.write(9, row(9))
    writer.close()
    assert [one["step"] for one in log("row")] == list(range(1, 10))


def test_a_workdir_in_a_bucket(log, bucket):
    """The state of a tracker is kept in the bucket, and the rows are read from there."""
    for start_step, steps in ((0, (1, 2, 3, 4)), (3, (4, 5))):
        writer, _ = open_writer("mlflow", epath.Path("gs://bucket/tracked"), start_step, print)
        for step in steps:
            writer.write(step, row(step))
        writer.close()
    assert [one["step"] for one in log("row")] == [1, 2, 3, 4, 5]
    assert len({one["id"] for one in log("row")}) == 1
    assert "tracked/trackers/mlflow.json" in bucket.names("bucket", "tracked/")


def test_another_run_in_the_same_place_is_another_run_there(log, tmp_path, monkeypatch):
    """Nothing was saved before it was started anew, with another setting."""
    for batch in (16, 16, 32):
        (tmp_path / metrics.FILE).unlink(missing_ok=True)
        sink = trackers.Trackers(
            ["wandb"],
            workdir=epath.Path(tmp_path),
            project="test",
            start_step=0,
            went_back=False,
            config={"batch_size": batch},
            hardware="1 x cpu",
            say=print,
        )
        sink.write(1, row(1))
        sink.close()
    first, second, third = (one["id"] for one in log("begin"))
    assert first == second != third
    assert [one["id"] for one in log("row")] == [first, third]


def test_metrics_of_one_step_may_come_in_two_rows(log, tmp_path):
    """Training and evaluation each write one."""
    writer, _ = open_writer("mlflow", tmp_path, 0, print)
    writer.write(1, {"train/loss": 2.0})
    writer.write(1, {"zeroshot/top1": 0.5})
    writer.write(1, {"zeroshot/top1": 0.6})
    writer.close()
    got = [one["metrics"] for one in log("row")]
    assert got == [{"train/loss": 2.0}, {"zeroshot/top1": 0.5}]


def test_a_tracker_that_is_down_gets_the_rows_later(log, tmp_path, monkeypatch):
    down = tmp_path / "told.down"
    down.touch()
    monkeypatch.setenv("FAKE_TRACKER_FAILS", "down")
    said: list[str] = []
    writer, _ = open_writer("mlflow", tmp_path / "run", 0, said.append)
    for step in range(1, 9):
        writer.write(step, row(step))
    wait_until(lambda: len(log("row")) == 2)
    time.sleep(0.5)
    writer.write(9, row(9))
    down.unlink()
    writer.close()
    assert [one["step"] for one in log("row")] == list(range(1, 10))
    told = [text for text in said if "mlflow" in text]
    assert sum("does not take the metrics (ConnectionError: connection" in x for x in told) == 1
    assert sum("takes the metrics again" in text for text in told) == 1
    assert len(metrics.read_history(tmp_path / "run")) == 9


@pytest.mark.parametrize("fails", ["hang", "exit"])
def test_a_tracker_that_hangs_or_dies_is_left_behind(fails: str, log, tmp_path, monkeypatch):
    """No row takes long, the memory is bounded, and neither is the end held up."""
    monkeypatch.setenv("FAKE_TRACKER_FAILS", fails)
    monkeypatch.setattr(trackers, "_KEPT", 50)
    monkeypatch.setattr(trackers, "_CLOSE_TIMEOUT", 1.0)
    said: list[str] = []
    writer, sink = open_writer("trackio", tmp_path, 0, said.append)
    (tracker,) = sink._trackers
    writer.write(1, row(1))
    wait_until(lambda: log("row"))
    longest = 0.0
    for step in range(2, 3000):
        began = time.perf_counter()
        sink.write(step, row(step))
        longest = max(longest, time.perf_counter() - began)
        if step == 10:
            time.sleep(0.5)
    assert longest < 5  # one that waited for the tracker would take for ever
    assert len(tracker._lines) <= 50
    began = time.monotonic()
    writer.close()
    assert time.monotonic() - began < 30
    assert tracker._process.poll() is not None
    [about] = [text for text in said if "send" in text]
    assert ("within 1 s" if fails == "hang" else "its process has ended") in about
    assert sum("has not taken 50 rows" in text for text in said) == (fails == "hang")


@pytest.mark.slow
def test_a_tracker_that_hangs_does_not_outlive_a_killed_trainer(log, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_TRACKER_FAILS", "hang")
    start("wandb", tmp_path / "run", 0, 20, "kill")
    (begun,) = log("begin")
    wait_until(lambda: not pathlib.Path(f"/proc/{begun['pid']}").exists())


def test_a_missing_tracker_is_named(monkeypatch):
    assert trackers.parse("") == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"mlflow, which is not installed.*pip install mlflow"):
        trackers.parse(" mlflow")


def test_an_unknown_tracker_is_named():
    config = vit_b32.get_config("smoke")
    config.log.trackers = "wandb, tensorboard"
    with pytest.raises(UserError, match=r"log\.trackers names tensorboard, and may name wandb"):
        validation.validate(config)


# ---- The real ones, where they are installed ----------------------------------------------------


@pytest.mark.slow
def test_mlflow(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    start("mlflow", tmp_path / "run", 0, 20, "kill", MLFLOW_TRACKING_URI=uri, KILL_AFTER="20")
    start("mlflow", tmp_path / "run", 15, 30, "close", MLFLOW_TRACKING_URI=uri)
    client = mlflow.MlflowClient(uri)
    place = client.get_experiment_by_name("test").experiment_id
    (run,) = client.search_runs([place])
    assert run.info.status == "FINISHED"
    assert run.data.params["batch_size"] == "16"
    for name in ("train/loss", "retrieval/recall_at_1"):
        history = client.get_metric_history(run.info.run_id, name)
        assert [one.step for one in history] == list(range(1, 31))


@pytest.mark.slow
def test_trackio(tmp_path):
    pytest.importorskip("trackio")
    import sqlite3

    settings = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    start("trackio", tmp_path / "run", 0, 20, "kill", KILL_AFTER="5", **settings)
    start("trackio", tmp_path / "run", 15, 30, "close", **settings)
    database = sqlite3.connect(tmp_path / "trackio" / "test.db")
    rows = database.execute("select run_name, step from metrics order by id").fetchall()
    assert [step for _, step in rows] == list(range(1, 31))
    assert len({name for name, _ in rows}) == 1


@pytest.mark.slow
def test_wandb(tmp_path):
    """Offline, as two parts of one run that `wandb sync` would send."""
    pytest.importorskip("wandb")
    settings = {"WANDB_MODE": "offline"}
    start("wandb", tmp_path / "run", 0, 20, "kill", KILL_AFTER="5", **settings)
    start("wandb", tmp_path / "run", 15, 30, "close", **settings)
    parts = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(parts) == 2
    assert len({part.name.rpartition("-")[2] for part in parts}) == 1
