"""python -m clip_jax status: the states of made and of real runs."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import html_page
import made_runs
import pytest
import tiny_run
from etils import epath

from clip_jax.status import cli, page, run, text
from clip_jax.status.look import Look
from clip_jax.status.run import State
from clip_jax.storage import faults
from clip_jax.training import lease

PLAIN = Look(100, colour=False, unicode=True)
NOW = 9010  # seconds after made_runs.BEGAN, 10 after the last sign of life of `weekend`


@pytest.fixture
def weekend(tmp_path) -> pathlib.Path:
    workdir = tmp_path / "b32"
    made_runs.weekend(workdir)
    made_runs.touch_lease(workdir, 9000)
    return workdir


def look(workdir: pathlib.Path, now: float = NOW, before: run.Run | None = None) -> run.Run:
    return run.look(str(workdir), made_runs.at(now), before)


def words(found: run.Run, how: Look = PLAIN) -> str:
    """The text on a run, its lines joined."""
    return " ".join(text.one(found, how).replace("\N{NO-BREAK SPACE}", " ").split())


# ---- States ------------------------------------------------------------------------------------


def test_running(weekend):
    found = look(weekend)
    assert run.state(found) is State.RUNNING
    told = words(found)
    assert "RUNNING step 12,000 of 20,000, 60.0 %" in told
    # 8,000 steps at the pace of start 4: 6,000 steps in 2,700 + 100 + 50 + 100 s.
    assert found.left == pytest.approx(8000 * 2950 / 6000)
    assert "3,210 images/s, MFU 41.2 %, about 1h 05m left" in told
    assert "start 4 since" in told
    assert "on tpu-host-0, process 4242; last sign of life 10s ago" in told
    assert "Where 2h 30m went: goodput 60.3 %, 2,000 steps trained again" in told
    assert "training that was lost 15m 25s 10.3 %" in told
    assert "4,000 to 8,000 2,000 killed, or its host is gone" in told
    assert "step 7,000: The newest checkpoint, of step 8,000, is damaged" in told
    assert "latest 12,000, best 12,000 with zeroshot/top1 36.4 %" in told
    assert "loss 1.233" in told


def test_dead(weekend):
    made_runs.touch_lease(weekend, 8995)
    shutil.rmtree(weekend / "checkpoints" / "12000")
    found = look(weekend, 9400)
    assert run.state(found) is State.DEAD
    told = words(found)
    assert "no sign of life for 6m 40s" in told
    assert "resumes at step 10,000 and repeats 2,000 steps" in told
    assert "$ python main.py --config=configs/vit_b32.py --workdir=runs/b32" in told
    assert "left, until" not in told


def test_a_lease_that_beats_is_a_sign_of_life(weekend):
    """The storage may refuse the record and take the lease."""
    made_runs.touch_lease(weekend, 9390)
    assert run.state(look(weekend, 9400)) is State.RUNNING


def test_stalled(tmp_path):
    made_runs.write_start(
        tmp_path, 1, (0, 2000), (0, 100), {"train": 1100.0}, stepped=made_runs.at(500).isoformat()
    )
    found = look(tmp_path, 2010)
    assert run.state(found) is State.STALLED
    assert "no step for 25m 00s" in words(found)
    assert "end it (SIGTERM" in words(found)


@pytest.mark.parametrize(
    ("since_step", "phase", "interval", "state"),
    [
        (100, "train", 1, State.RUNNING),  # less than two minutes
        (150, "train", 1, State.STALLED),
        (150, "evaluation", 1, State.RUNNING),
        (2000, "evaluation", 1, State.STALLED),
        (1000, "train", 300, State.RUNNING),  # logs a step of 1 s every 300 only
        (1300, "train", 300, State.STALLED),
    ],
)
def test_patience(tmp_path, since_step: int, phase: str, interval: int, state: State):
    stepped, seen = 1000, 1000 + since_step
    training = 1000.0 + (since_step if phase == "train" else 0)
    made_runs.write_start(
        tmp_path, 1, (0, seen), (0, 1000), {"train": training},
        stepped=made_runs.at(stepped).isoformat(), phase=phase,
    )  # fmt: skip
    made_runs.write_rows(tmp_path, range(interval, 901, interval))
    assert run.state(look(tmp_path, seen + 5)) is state


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (42, "The same command begins afresh, since there is no checkpoint; a launcher"),
        (143, "a launcher"),
        (130, "The same command begins afresh, since there is no checkpoint."),
        (2, "Put right what it names."),
        (1, "This is a fault of the program; its log has the traceback."),
        (77, "Its log may say more."),
    ],
)
def test_stopped(tmp_path, code: int, advice: str):
    made_runs.write_start(
        tmp_path, 1, (0, 100), (0, 100), {"train": 90.0}, (code, "The reason\nof it all.")
    )
    found = look(tmp_path, 9000)
    assert run.state(found) is State.STOPPED
    assert f"The reason of it all. (exit code {code})" in words(found)
    assert advice in words(found)


def test_finished(tmp_path):
    made_runs.write_start(
        tmp_path, 1, (0, 100), (0, 20_000), {"train": 90.0}, (0, "Finished at step 20,000.")
    )
    found = look(tmp_path, 9000)
    assert run.state(found) is State.FINISHED
    assert run.advice(found) == ""


@pytest.mark.parametrize("steps", [None, (0, 0)])
def test_starting(tmp_path, steps):
    made_runs.write_start(tmp_path, 1, (0, 100), steps, {"start": 90.0}, phase="compile")
    found = look(tmp_path, 110)
    assert run.state(found) is State.STARTING
    assert "compiling; start 1 since" in words(found)


def test_a_new_start_that_has_not_written_yet(tmp_path):
    made_runs.write_start(tmp_path, 1, (0, 100), (0, 50), {"train": 9.0}, (42, "SIGTERM."))
    made_runs.write_lease(tmp_path)
    made_runs.touch_lease(tmp_path, 8995)
    found = look(tmp_path, 9000)
    assert run.state(found) is State.STARTING
    assert "starting again on tpu-host-0" in words(found)


def test_on_this_machine_the_process_tells(tmp_path):
    """A process is asked for, by any clock; its number may be another's by now."""
    made_runs.write_start(tmp_path, 1, (0, 100), (0, 50), {"train": 90.0})
    mine = {"machine": lease._machine(), "pid": os.getpid(), "host": "here"}
    made_runs.write_lease(tmp_path, **mine, started=lease._started(os.getpid()))
    assert run.state(look(tmp_path, 10)) is State.RUNNING  # its clock is ahead
    made_runs.write_lease(tmp_path, **mine, started="1")
    found = look(tmp_path, 110)
    assert run.state(found) is State.DEAD
    assert "on here is gone" in run.sentence(found)


# ---- Clocks, damage, other workdirs ------------------------------------------------------------


def test_a_clock_that_is_ahead_is_watched(weekend):
    made_runs.touch_lease(weekend, 9000)
    first = look(weekend, 1000)
    assert run.state(first) is State.UNCLEAR
    assert "2h 13m in the future, so the clocks differ" in words(first)
    assert run.state(look(weekend, 1010, first)) is State.UNCLEAR  # no beat is due yet
    assert run.state(look(weekend, 1000 + run.WATCH, first)) is State.DEAD
    made_runs.write_lease(weekend, beat=4)
    made_runs.touch_lease(weekend, 9015)
    later = look(weekend, 1015, first)
    assert run.state(later) is State.RUNNING
    assert run.state(look(weekend, 1030, later)) is State.RUNNING
    assert run.state(look(weekend, 1041, later)) is State.DEAD


def test_damage_is_said_and_counted(weekend):
    (weekend / "starts" / "0002.json").write_text('{"start": 2, "beg')
    (weekend / "config.json").write_text("[]")
    (weekend / "lease.json").write_text("{")
    made_runs.touch_lease(weekend, 9000)
    assert "on an unknown host" in words(look(weekend))
    made_runs.write_lease(weekend, pid=float("inf"))
    assert "on an unknown host" in words(look(weekend))
    made_runs.touch_lease(weekend, 9000)
    with (weekend / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": {10**400}}}\n{{"step": 12020, "train/lo')
    found = look(weekend)
    assert run.state(found) is State.RUNNING
    told = words(found)
    assert "! starts/0002.json is left out, since it is damaged: it is cut short" in told
    assert "! Start 2 has no record that can be read." in told
    assert "! config.json is left out" in told
    assert "! 2 of 614 lines of metrics.jsonl are left out" in told
    assert "without a record" in told


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_loss_that_is_no_curve(tmp_path, value: float):
    made_runs.write_start(tmp_path, 1, (0, 100), (0, 3), {"train": 90.0}, (1, "Broken."))
    rows = [{"step": step, "train/loss": value} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = look(tmp_path)
    for how in PLAIN, Look(60, colour=True, unicode=True), Look(300, colour=False, unicode=False):
        assert text.one(found, how)
        assert text.several([found, found], how)
    page.write(tmp_path / "status.html", [found, found])


def test_nothing_of_a_run_obeys(tmp_path):
    """Neither the terminal nor the page obeys a message, and lone surrogates can be written."""
    evil = "\x1b[2J<script>alert(1)</script>\ud800\r\n"
    made_runs.write_start(
        tmp_path, 1, (0, 100), (0, 3), {"train": 90.0}, (2, evil), hardware=evil, command=evil,
        events=[{"time": made_runs.at(5).isoformat(), "step": 1, "text": evil}],
    )  # fmt: skip
    rows = [{"step": i, f"train/{evil}": i, "train/loss": i, f"{evil}/top1": 0.5} for i in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"checkpoint": {"best_metric": f"{evil}/top1"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    found = look(tmp_path)
    for told in text.one(found, PLAIN), text.several([found, found], PLAIN):
        assert "\x1b" not in told
        assert "\r" not in told
        PLAIN.shown(told).encode()
    page.write(tmp_path / "status.html", [found])
    assert "<script>" not in (tmp_path / "status.html").read_text()


def test_a_workdir_of_an_earlier_version(tmp_path):
    made_runs.write_rows(tmp_path, range(10, 101, 10))
    (tmp_path / "config.json").write_text('{"duration": "200 steps"}')
    found = look(tmp_path)
    assert run.state(found) is State.STOPPED
    told = words(found)
    assert "STOPPED step 100 of 200, 50.0 %" in told
    assert "! It has no records of its starts" in told
    made_runs.write_lease(tmp_path)
    made_runs.touch_lease(tmp_path, NOW - 10)
    assert run.state(look(tmp_path)) is State.RUNNING
    made_runs.touch_lease(tmp_path, NOW - 100)
    (tmp_path / "report.html").write_text("")
    assert run.state(look(tmp_path)) is State.FINISHED


def test_what_is_no_workdir(tmp_path, capsys):
    for name in ("runs/a", "more/a", "more/b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    for name, told in (
        ("nothing", "is no directory"),
        ("file", "is a file"),
        ("runs", f"is no workdir of a run, but holds one: {tmp_path}/runs/a."),
        ("runs/a", ""),
        ("more", f"is no workdir of a run, but holds 2: give {tmp_path}/more/*, or some of a, b."),
    ):
        error = run.look(str(tmp_path / name)).error
        assert told in str(error)
    assert "A WORKDIR is empty" in str(run.look("").error)
    with pytest.raises(SystemExit) as ended:
        cli.main(["gs://"])
    assert ended.value.code == 2
    assert "names no bucket" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit) as ended:
        cli.main([str(tmp_path / "runs/a"), f"--html={tmp_path}"])
    assert ended.value.code == 2
    assert f"--html={tmp_path} cannot be written" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.main([str(tmp_path / "nothing"), "--json"])
    assert ended.value.code == 2
    assert "is no directory" in json.loads(capsys.readouterr().out)["sentence"]


# ---- Real runs ---------------------------------------------------------------------------------


def test_a_real_run():
    found = run.look(str(tiny_run.finished()))
    assert run.state(found) is State.FINISHED
    (start,) = found.starts
    assert (start.from_step, start.step, start.code) == (0, 12, 0)
    assert found.account.wall == pytest.approx(sum(start.seconds.values()), rel=0.02)
    assert found.account.seconds["evaluation"] > 0
    assert found.checkpoints.steps[-1] == 12
    assert not found.remarks
    report = html_page.check((tiny_run.finished() / "report.html").read_text())
    assert report.rows("time")[-1][3:5] == ["0", "12"]
    assert "jax=" in report.find("section")[-1]["text"]


@pytest.mark.slow
def test_a_real_run_that_is_killed_and_resumed(tmp_path):
    """Living, dead, and finished, as another process sees it."""
    workdir = tmp_path / "run"
    script = "import sys; sys.path[:0] = ['tests/support']; import tiny_run; "
    script += "from clip_jax.training import train; train.train(tiny_run.config("
    script += "{'duration': '400 steps', 'checkpoint.every': '40 steps', 'eval.every': '0 steps', "
    script += "'log.every': '10 steps'}), sys.argv[1])"
    command = [sys.executable, "-c", script, str(workdir)]

    def state() -> dict:
        told = subprocess.run(
            [sys.executable, "-m", "clip_jax", "status", str(workdir), "--json"],
            capture_output=True, text=True,
        )  # fmt: skip
        return json.loads(told.stdout)

    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(workdir.glob("checkpoints/40")) and time.monotonic() < deadline:
        time.sleep(0.1)
    living = state()
    process.kill()
    process.wait()
    dead = state()
    assert living["state"] in ("running", "starting")
    assert living["process"] == process.pid
    assert dead["state"] == "dead"
    assert "is gone" in dead["sentence"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    finished = state()
    assert finished["state"] == "finished"
    first, second = finished["starts"]
    assert second["from_step"] % 40 == 0
    assert second["from_step"] > 0
    assert second["step"] == 400
    assert first["ended"].startswith("killed")
    assert 0 < finished["goodput"] < 1
    assert finished["seconds"]["down"] >= 0


# ---- Buckets -----------------------------------------------------------------------------------


def test_in_a_bucket(bucket, weekend, monkeypatch):
    """Reads a bucket as a disk; the object that marks a checkpoint as complete decides."""
    far = epath.Path("gs://bucket/runs/weekend")
    for path in weekend.rglob("*"):
        if path.is_file():
            (far / path.relative_to(weekend)).write_bytes(path.read_bytes())
    for step in ("8000", "10000"):
        (far / "checkpoints" / step / "commit_success.txt").write_text("")
    (far / "checkpoints" / "12000" / "model").write_text("half")
    found = run.look(str(far), made_runs.at(NOW))
    here = look(weekend)
    assert found.error is None
    assert run.state(found) is State.RUNNING
    assert (found.starts, found.rows, found.account) == (here.starts, here.rows, here.account)
    assert found.checkpoints.steps == [8000, 10_000]
    assert run.state(run.look(str(far), made_runs.at(9400))) is State.DEAD
    page.write(far / "status.html", [found])
    html_page.check((far / "status.html").read_text())


def test_buckets_that_cannot_be_read(bucket, monkeypatch):
    monkeypatch.setattr(faults, "RETRY_FOR", 1.0)
    for name, told in ("gs://bucket/nothing", "holds no run"), ("gs://no-such/a", "no-such"):
        found = run.look(name)
        assert run.state(found) is State.UNREADABLE
        assert told in str(found.error)
    bucket.rights("bucket", "none")
    assert run.state(run.look("gs://bucket/nothing")) is State.UNREADABLE
