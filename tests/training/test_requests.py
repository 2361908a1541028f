"""Runs that are asked to stop, to save or to trace, by signals and by the clock."""

import contextlib
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny
import tiny_run
import xla_flags
from several_hosts import endings, flags

from clip_jax import sharding
from clip_jax.common import commands, lifeline, metrics
from clip_jax.data import feed, pipeline
from clip_jax.errors import ExitCode, Stopped
from clip_jax.evaluate.evaluator import Evaluator
from clip_jax.training import loop, record, train
from clip_jax.training.requests import Request, Requests

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _compile_once():
    with tiny_run.compile_once():
        yield


@pytest.fixture(autouse=True)
def _not_under_nohup():
    """The suite may be, and runs would ignore SIGHUP too."""
    before = signal.getsignal(signal.SIGHUP)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def send(monkeypatch):
    """A function that has signals sent to this process where the log shows a step."""

    def at(step: int, *numbers: signal.Signals) -> None:
        show = metrics.Progress.show

        def shown(self, now: int, *rest) -> None:
            show(self, now, *rest)
            for number in numbers if now == step else ():
                os.kill(os.getpid(), number)

        monkeypatch.setattr(metrics.Progress, "show", shown)

    return at


def starts(workdir: pathlib.Path) -> list[dict]:
    whole = sorted((workdir / "starts").glob("[0-9]*.json"))  # not one that is being written
    return [json.loads(path.read_text()) for path in whole]


def assert_goes_on_to_the_bit(workdir: pathlib.Path) -> None:
    train.train(tiny_run.config(), workdir)
    whole = tiny_run.finished()
    assert tiny_run.learned(workdir) == tiny_run.learned(whole)
    tiny_run.assert_same_checkpoint(workdir, whole, step=12)


SIGNALS = [
    (signal.SIGTERM, ExitCode.RESUME),
    (signal.SIGHUP, ExitCode.RESUME),
    (signal.SIGINT, ExitCode.INTERRUPTED),
]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_signals_that_ask_for_a_stop(number, code):
    before, asked = signal.getsignal(number), Requests()
    with asked.heard(), asked.deferred(tiny.make_mesh(1, 1)):
        assert not asked.poll()
        os.kill(os.getpid(), number)
        assert asked.poll() == Request.STOP
        assert asked.stopped(3).exit_code == code
        assert str(asked.stopped(3)).startswith(f"{number.name}: saved at step 3.")
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("number", "code"),
    [SIGNALS[0], *(pytest.param(*each, marks=pytest.mark.slow) for each in SIGNALS[1:])],
)
def test_a_signal_saves_the_step_under_way(tmp_path, send, monkeypatch, number, code):
    before = signal.getsignal(number)
    send(2, number)
    with pytest.raises(Stopped, match=rf"^{number.name}: saved at step 3\.") as stopped:
        train.train(tiny_run.config(), tmp_path)
    assert stopped.value.exit_code == code
    assert signal.getsignal(number) is before
    (start,) = starts(tmp_path)
    assert start["end"] == {"code": code, "reason": str(stopped.value)}
    assert (start["from_step"], start["step"]) == (0, 3)
    monkeypatch.undo()
    assert_goes_on_to_the_bit(tmp_path)
    assert [one["from_step"] for one in starts(tmp_path)] == [0, 3]
    assert starts(tmp_path)[1]["end"] == {"code": 0, "reason": "Finished at step 12."}


def test_a_signal_ends_an_evaluation_which_the_next_start_does(tmp_path, monkeypatch, capsys):
    run = Evaluator.run

    def evaluate(self, variables, between):
        def heed() -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            between()

        return run(self, variables, heed)

    with monkeypatch.context() as patched:
        patched.setattr(Evaluator, "run", evaluate)
        with pytest.raises(Stopped, match="saved at step 6"):
            train.train(tiny_run.config(), tmp_path)
        rows = tiny_run.read_metrics(tmp_path)
        assert (6, "train/loss") in rows
        assert (6, "zeroshot/top1") not in rows
    capsys.readouterr()
    train.train(tiny_run.config(), tmp_path)
    assert capsys.readouterr().out.count("step 6 evaluation") == 1
    assert_goes_on_to_the_bit(tmp_path)
    # Its checkpoint, saved before, is ranked by it.
    ranked = json.loads((tmp_path / "checkpoints/6/metrics/metrics").read_text())
    assert ranked == {"zeroshot/top1": tiny_run.read_metrics(tmp_path)[6, "zeroshot/top1"]}


@pytest.mark.slow
def test_a_signal_in_the_last_evaluation(tmp_path, send, monkeypatch):
    send(12, signal.SIGTERM)
    with pytest.raises(Stopped, match="saved at step 12"):
        train.train(tiny_run.config(), tmp_path)
    monkeypatch.undo()
    assert_goes_on_to_the_bit(tmp_path)


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(5, id="unsaved"),
        pytest.param(4, id="saved", marks=pytest.mark.slow),
        pytest.param(0, id="none", marks=pytest.mark.slow),
    ],
)
def test_a_signal_is_heard_while_no_batch_comes(tmp_path, monkeypatch, steps: int):
    """The last finished step is saved, unless it is, without waiting for the next batch."""
    opened, released = pipeline.TrainPipeline.__iter__, threading.Event()
    asked_at: list[float] = []
    feeds: list[feed.Feed] = []

    def stuck(self):
        batches = opened(self)
        yield from itertools.islice(batches, steps)
        while not (feeds[0].waiting and feeds[0]._ready.empty()):
            time.sleep(0.1)
        time.sleep(1.0)
        asked_at.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)
        released.wait(60)
        batches.close()

    with monkeypatch.context() as patched:
        patched.setattr(pipeline.TrainPipeline, "__iter__", stuck)
        patched.setattr(loop, "Feed", lambda *a, **b: feeds.append(feed.Feed(*a, **b)) or feeds[0])
        said = rf"^SIGTERM: saved at step {steps}\." if steps else r"^SIGTERM, before the first"
        with pytest.raises(Stopped, match=said) as stopped:
            train.train(tiny_run.config(), tmp_path)
    assert time.monotonic() - asked_at[0] < 10  # of which the save takes most
    released.set()
    assert stopped.value.exit_code == ExitCode.RESUME
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert (str(steps) in kept) == (steps > 0)
    assert_goes_on_to_the_bit(tmp_path)


def test_ctrl_c_twice_ends_at_once(tmp_path, send):
    send(5, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train.train(tiny_run.config(), tmp_path)
    assert starts(tmp_path)[0]["end"]["code"] == ExitCode.INTERRUPTED


def test_before_the_first_step_there_is_nothing_to_save(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_compile", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="no step is under way") as stopped:
        train.train(tiny_run.config(), tmp_path)
    assert stopped.value.exit_code == ExitCode.RESUME
    assert not stopped.value.everywhere
    assert starts(tmp_path)[0]["end"]["code"] == ExitCode.RESUME


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_ends_nothing_is_not_lost(tmp_path, monkeypatch, number):
    """Python prints and drops what is raised within a callback of the garbage collector."""
    compiled = train._compile

    def dropped(*arguments):
        with contextlib.suppress(Stopped, KeyboardInterrupt):
            os.kill(os.getpid(), number)
        return compiled(*arguments)

    monkeypatch.setattr(train, "_compile", dropped)
    with pytest.raises(Stopped, match=rf"^{number.name}: saved at step 1\."):
        train.train(tiny_run.config(), tmp_path)


def test_signals_that_a_shell_has_switched_off_stay_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Requests().heard():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_saves_by_the_clock(tmp_path, monkeypatch):
    """Every poll is "an hour" after the one before: a checkpoint is due at every second of them."""
    config = tiny_run.config({"checkpoint.every": "2 hours", "checkpoint.keep": 99})
    config.checkpoint.best_metric = ""
    hours = iter(range(100))
    monkeypatch.setattr(
        "clip_jax.training.requests.time",
        type("Clock", (), {"monotonic": staticmethod(lambda: 3600.0 * next(hours))}),
    )
    poll, polled = Requests.poll, []
    monkeypatch.setattr(Requests, "poll", lambda self: polled.append(poll(self)) or polled[-1])
    train.train(config, tmp_path)
    assert Request.SAVE in polled
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept[-1] == 12
    assert 4 <= len(kept) < 12


def test_a_second_sigterm_leaves_the_end_alone():
    asked = Requests()
    with asked.heard():
        with asked.deferred(sharding.make_mesh()):
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked.poll() == Request.STOP
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_on_several_hosts_the_clock_asks_for_one_save(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)  # so that the next poll returns a request
    mesh = sharding.make_mesh()
    asked = Requests(save_every=10.0)
    found = []
    with asked.deferred(mesh):
        asked._saved_at -= 11
        for _ in range(5):
            found.append(asked.poll())
            if Request.SAVE in found[-1]:
                asked.saved()
    assert found == [0, Request.SAVE, 0, 0, 0]


def test_no_signal_is_lost_that_comes_within_a_poll():
    count, asked, sent = 300, Requests(), threading.Semaphore(0)
    heard = []
    take = asked._take
    asked._take = lambda *signal: (take(*signal), heard.append(signal))

    def send() -> None:
        for _ in range(count):
            sent.acquire()
            os.kill(os.getpid(), signal.SIGUSR2)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with asked.heard():
            thread = threading.Thread(target=send, daemon=True)
            thread.start()
            for number in range(count):
                sent.release()
                found = Request(0)
                while len(heard) == number:
                    found |= asked.poll()
                assert Request.TRACE in found | asked.poll()
            thread.join()
    finally:
        sys.setswitchinterval(interval)


def test_a_start_that_is_killed_leaves_its_last_sign_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "_EVERY", 0.05)
    kept = record.Record(tmp_path, time.monotonic())
    monkeypatch.setattr(kept, "end", lambda *_: None)  # as a kill has it
    with kept.kept(command="train"), kept.during("train"):
        kept.begins(3)
        kept.reached(5, waited=0.01)
        kept.add(4, "something went wrong")
        deadline, seconds = time.monotonic() + 30, 0.0
        while seconds <= 0.2 and time.monotonic() < deadline:
            time.sleep(0.05)
            (start,) = starts(tmp_path)
            seconds = start["seconds"].get("train", 0.0)
    kept._ended.set()
    assert start["ended"] is start["end"] is None
    assert (start["from_step"], start["step"], start["command"]) == (3, 5, "train")
    assert [event["text"] for event in start["events"]] == ["something went wrong"]
    assert 0.2 < seconds < 30
    assert start["seconds"]["data"] == 0.01
    assert record.Record(tmp_path, time.monotonic()).number == 2


def test_hosts_that_have_all_stopped_do_not_wait_for_news(monkeypatch):
    class Store:
        def key_value_set(self, key: str, value: str) -> None:
            pass

    monkeypatch.setattr(lifeline, "_lifeline", lifeline.Lifeline(0, 1, "localhost", Store()))
    monkeypatch.setattr(lifeline.time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s"))
    with pytest.raises(SystemExit) as ended, commands.plain_errors():
        raise Stopped("SIGTERM", ExitCode.RESUME, everywhere=True)
    assert ended.value.code == ExitCode.RESUME


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_two_hosts_save_the_same_step(tmp_path, asked):
    settings = {"duration": "400 steps", "checkpoint.every": "1 hours", "eval.every": "400 steps"}
    given = {**tiny_run.SETTINGS, **settings}
    command = [sys.executable, "main.py", "--config=configs/vit_b32.py:smoke"]
    command += [f"--config.{name}={value}" for name, value in given.items()]
    hosts = [
        subprocess.Popen(
            [*command, f"--workdir={tmp_path}", *own],
            cwd=ROOT,
            env=xla_flags.environment(1),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in flags(2)
    ]
    rows = tmp_path / "metrics.jsonl"
    while all(host.poll() is None for host in hosts):
        if rows.exists() and len(rows.read_text().splitlines()) > 3:
            break
        time.sleep(0.2)
    hosts[asked].send_signal(signal.SIGTERM)
    ended = endings(hosts)
    assert [each.returncode for each in ended] == [ExitCode.RESUME, ExitCode.RESUME]
    said = {each.stderr.split("saved at step ")[1].split(".")[0] for each in ended}
    assert len(said) == 1
    assert "SIGTERM" in ended[asked].stderr
    assert "Another host was asked to stop" in ended[1 - asked].stderr
    assert (tmp_path / "checkpoints" / said.pop()).exists()
