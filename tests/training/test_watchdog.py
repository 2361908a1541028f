"""The watchdog: hosts that come to a standstill are described, named and ended for a restart."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from several_hosts import endings, flags, launch

from clip_jax.common import commands, hosts, lifeline
from clip_jax.errors import ExitCode
from clip_jax.training import watchdog

LIMIT = 1.0  # seconds without a step
STEPS = 3  # that all hosts make before the fault
LATER = 60  # seconds: nothing in this file takes so long


def work(how: str, workdir: str, *address: str) -> None:
    """A host that makes some steps; the last host then comes to a standstill by `how`."""
    watchdog._TICK = 0.05
    with commands.plain_errors():
        host, count = 0, 1
        if address:
            host, count = hosts.join(address[0], int(address[1]), int(address[2]))
        at_fault = how if host == (0 if how == "first frozen" else count - 1) else "in step"
        phase = ["train"]
        dog = watchdog.Watchdog(
            LIMIT, {"data": 2 * LIMIT}, lambda: phase[0], lambda: "reading example 7", workdir
        )
        with dog.watching():
            for step in range(1, STEPS + 1):
                dog.beat(step)
            print("ready", flush=True)
            if "frozen" in how:  # not before the others have left the service of the first
                arrive(host, count, pathlib.Path(workdir), dog)
            if at_fault == "waiting for data":
                phase[0] = "data"
            if at_fault in ("evaluating", "busy evaluating"):
                phase[0] = "evaluation"
            if at_fault == "a step on" or (how == "a step behind" and at_fault == "in step"):
                dog.beat(STEPS + 1)
            if "frozen" in at_fault:
                os.kill(os.getpid(), signal.SIGSTOP)
            for _ in range(int(4 * LIMIT / 0.1) if "busy" in how else 0):
                time.sleep(0.1)
                if at_fault != "in step":
                    dog.beat()
            if "busy" not in how:
                stuck_in_a_collective()
        print("done", flush=True)


def arrive(host: int, count: int, workdir: pathlib.Path, dog: watchdog.Watchdog) -> None:
    """Waits until all hosts are here."""
    (workdir / f"arrived-{host}").touch()
    while len([*workdir.glob("arrived-*")]) < count:
        dog.beat()
        time.sleep(0.02)


def stuck_in_a_collective() -> None:
    time.sleep(LATER)


def run(how: str, workdir: pathlib.Path, count: int = 1) -> list[subprocess.CompletedProcess]:
    addresses = (
        [[f.partition("=")[2] for f in each] for each in flags(count)] if count > 1 else [[]]
    )
    started = [launch([__file__, how, str(workdir), *each], devices=1) for each in addresses]
    if "frozen" in how:  # it does not end by itself
        frozen = started[0 if how == "first frozen" else -1]
        others = [process for process in started if process is not frozen]
        ended = endings(others)
        frozen.send_signal(signal.SIGCONT)
        ended.insert(started.index(frozen), endings([frozen])[0])
        return ended
    return endings(started)


def files(workdir: pathlib.Path) -> list[pathlib.Path]:
    return sorted(workdir.glob("stalls/*.txt"))


def test_one_host(tmp_path):
    (ended,) = run("in step", tmp_path)
    assert ended.returncode == ExitCode.RESUME
    *_, last = ended.stderr.strip().splitlines()
    assert last.startswith("No step has ended for 1")
    assert "Host 0: in step 3 (the devices, or a collective of all hosts)" in last
    (file,) = files(tmp_path)
    assert str(file) in last
    for text in (ended.stderr, file.read_text()):
        assert "Data: reading example 7." in text
        assert "tests/training/test_watchdog.py:" in text
        assert "in stuck_in_a_collective" in text
        assert "main thread:" in text


@pytest.mark.parametrize(
    ("how", "place", "hint"),
    [
        ("waiting for data", "host 1: waiting for data after step 3", "See to host 1 first."),
        pytest.param(
            "a step behind", "host 1: in step 3", "See to host 1 first.", marks=pytest.mark.slow
        ),
        pytest.param(
            "evaluating",
            "host 1: evaluating after step 3",
            "See to host 1 first.",
            marks=pytest.mark.slow,
        ),
        pytest.param("in step", "osts 0, 1: in step 3", "same place", marks=pytest.mark.slow),
    ],
)
def test_several_hosts(how, place, hint, tmp_path):
    ended = run(how, tmp_path, 2)
    (file,) = files(tmp_path)
    first = ended[0].stderr
    for text in (first.strip().splitlines()[-1], file.read_text()):
        assert place in text
        assert hint in text
    assert file.read_text().count("in stuck_in_a_collective") == 2
    assert "Stack on hosts 0, 1:" in first
    for host, each in enumerate(ended):
        assert each.returncode == ExitCode.RESUME
        assert hint in each.stderr
        assert each.stderr.count(f"Host {host} (") == 1
        assert "in stuck_in_a_collective" in each.stderr
        assert "Traceback" not in each.stderr


@pytest.mark.slow
def test_frozen_host_is_named(tmp_path):
    first, other, frozen = run("frozen", tmp_path, 3)
    for each in (first, other):
        assert each.returncode == ExitCode.RESUME
        assert "no answer from host 2, as if frozen or gone. See to host 2 first." in each.stderr
    assert frozen.returncode == ExitCode.RESUME  # it wakes up, and its connection is closed


def test_frozen_first_host_is_named(tmp_path):
    first, other = run("first frozen", tmp_path, 2)
    assert other.returncode == ExitCode.RESUME
    assert "no answer from host 0, as if frozen or gone. See to host 0 first." in other.stderr
    assert first.returncode == ExitCode.RESUME
    assert [file.stem[-5:] for file in files(tmp_path)] == ["host1"]


@pytest.mark.slow
def test_jax_names_the_wrong_host_but_the_lifeline_does_not(tmp_path):
    """A host that is frozen before the watchdog watches: the heartbeat of JAX tells, in 50 s."""
    program = "import os, signal, sys, time; from clip_jax.common import commands, hosts\n"
    program += "with commands.plain_errors():\n hosts.join(sys.argv[1], 3, int(sys.argv[3]))\n"
    program += " time.sleep(3)\n if sys.argv[3] == '1': os.kill(os.getpid(), signal.SIGSTOP)\n"
    program += f" time.sleep({2 * LATER})\n"
    addresses = [[f.partition("=")[2] for f in each] for each in flags(3)]
    began = time.monotonic()
    first, frozen, other = [launch(["-c", program, *each], devices=1) for each in addresses]
    for each in endings([first, other]):
        assert each.returncode == ExitCode.RESUME
        assert "Host 1 does not answer, as if its process or machine were frozen" in each.stderr
        assert "Host 0" not in each.stderr
    assert time.monotonic() - began < 75
    frozen.send_signal(signal.SIGCONT)
    assert endings([frozen])[0].returncode == ExitCode.RESUME


def test_hosts_wait_for_one_that_gives_signs_of_life(tmp_path):
    for host, each in enumerate(run("busy evaluating", tmp_path, 2)):
        assert (each.returncode, each.stdout) == (0, each.stdout)
        assert each.stdout.startswith("ready\n")
        assert each.stdout.endswith("done\n")
        waiting = "still waiting for host 1: evaluating after step 3."
        assert (waiting in each.stdout) == (host == 0)
    assert not files(tmp_path)


def test_usr1_says_what_a_host_does_and_ends_nothing(tmp_path, capfd):
    dog = watchdog.Watchdog(LATER, {}, lambda: "data", lambda: "reading example 7", tmp_path)
    with dog.watching():
        dog.beat(7)
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 10
        printed = ""
        while "main thread" not in printed and time.monotonic() < deadline:
            time.sleep(0.05)
            printed += capfd.readouterr().err
    assert "waiting for data after step 7" in printed
    assert "Data: reading example 7." in printed
    assert "in test_usr1_says_what_a_host_does" in printed


@pytest.fixture
def ended(monkeypatch) -> threading.Event:
    """Set where the watchdog would end this process, which goes on."""
    ended = threading.Event()
    monkeypatch.setattr(lifeline, "end", lambda *_: ended.set())
    monkeypatch.setattr(watchdog, "_END_WITHIN", 1e6)  # or a timer would, a minute later
    monkeypatch.setattr(watchdog, "_TICK", 0.02)
    return ended


def test_time_in_which_the_process_was_stopped_does_not_count(tmp_path, monkeypatch, ended):
    clock, jump = time.monotonic, [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock() + jump[0])
    dog = watchdog.Watchdog(20, {}, lambda: "train", lambda: "", tmp_path)
    with dog.watching():
        time.sleep(0.1)
        jump[0] += 3600
        assert not ended.wait(0.3)
        jump[0] += 8  # twice ten seconds count, and the rest
        time.sleep(0.1)
        jump[0] += 8
        assert ended.wait(5)


@pytest.mark.parametrize(
    ("limit", "phase", "ends"),
    [
        (0.3, "train", True),
        (0.3, "data", False),
        (0.3, "checkpoint", False),  # six times as long
        (0.05, "checkpoint", True),
        (0.0, "train", False),
        (0.0, "data", False),
    ],
)
def test_limits(limit, phase, ends, tmp_path, ended):
    dog = watchdog.Watchdog(limit, {"data": LATER}, lambda: phase, lambda: "", tmp_path)
    with dog.watching():
        assert ended.wait(30 if ends else 0.7) == ends


@pytest.mark.slow
def test_a_run_of_two_hosts_of_which_one_freezes(tmp_path):
    import tiny_run

    settings = {**tiny_run.SETTINGS, "duration": "100000 steps", "eval.every": "100000 steps"}
    settings |= {"step.timeout": 4.0, "data.processes": 2, "log.tensorboard": False}
    command = ["main.py", "--config=configs/vit_b32.py:smoke", f"--workdir={tmp_path}"]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    first, frozen = [launch([*command, *each], devices=1) for each in flags(2)]
    assert first.stdout is not None
    assert any(line.startswith("step 3/") for line in first.stdout)
    workers = [*children(first.pid), *children(frozen.pid)]
    assert len(workers) >= 4
    frozen.send_signal(signal.SIGSTOP)
    (ended,) = endings([first])
    frozen.send_signal(signal.SIGCONT)
    (woken,) = endings([frozen])
    assert ended.returncode == woken.returncode == ExitCode.RESUME
    assert "no answer from host 1, as if frozen or gone. See to host 1 first." in ended.stderr
    assert "clip_jax/training/loop.py" in ended.stderr
    assert "Data: " in files(tmp_path)[0].read_text()
    deadline = time.monotonic() + 10
    while any(is_alive(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    start = json.loads((tmp_path / "starts" / "0001.json").read_text())
    assert start["end"]["code"] == ExitCode.RESUME
    assert "See to host 1 first" in start["end"]["reason"]


def children(pid: int) -> list[int]:
    """Returns the processes that any of its threads has started."""
    texts = [path.read_text() for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for text in texts for child in text.split()]


def is_alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    work(*sys.argv[1:])
