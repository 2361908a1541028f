"""The lease of a workdir: one run at a time, and none that a dead run holds for ever."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import several_hosts
from etils import epath

from clip_jax.errors import ExitCode, UserError
from clip_jax.training import lease
from clip_jax.training import workdir as workdirs

# A second run: it takes the lease, says so, and holds it until it is killed.
HOLD = """
import sys, time
from clip_jax.training import lease
from clip_jax.training import workdir as workdirs
with lease.held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(workdir, before: str = "", **streams) -> subprocess.Popen:
    code = HOLD.replace("with lease", f"{before}\nwith lease", 1)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(workdir)], stdout=subprocess.PIPE, text=True, **streams
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_second_run_is_refused_and_a_killed_one_gives_up_at_once(tmp_path):
    process = hold(tmp_path)
    try:
        named = f"process {process.pid} on .*, since 20"
        with pytest.raises(UserError, match=named), lease.held(tmp_path):
            pass
        assert (tmp_path / lease.FILE).exists()  # the refused one leaves it alone
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with lease.held(tmp_path):
        assert json.loads((tmp_path / lease.FILE).read_text())["pid"] == os.getpid()
    assert not (tmp_path / lease.FILE).exists()


def elsewhere(workdir: epath.Path, beat: int = 0) -> None:
    """Writes the lease of a run on another machine."""
    (workdir / lease.FILE).write_text(
        json.dumps(
            {
                "id": "a",
                "host": "other",
                "pid": os.getpid(),
                "machine": "another boot",
                "started": "1",
                "since": "2020-01-01 00:00:00",
                "beat": beat,
            }
        )
    )


@pytest.fixture(params=["local", "gs"])
def workdir(request, tmp_path) -> epath.Path:
    if request.param == "local":
        return epath.Path(tmp_path)
    request.getfixturevalue("bucket")
    return epath.Path(f"gs://bucket/{tmp_path.name}-lease")


def test_silent_run_on_another_host_is_dead(workdir, monkeypatch, capsys):
    monkeypatch.setattr(lease, "EXPIRES", 0.4)
    elsewhere(workdir)
    with lease.held(workdir):
        assert json.loads((workdir / lease.FILE).read_text())["pid"] == os.getpid()
    assert "names a run on other" in capsys.readouterr().out
    assert not (workdir / lease.FILE).exists()


def test_run_on_another_host_that_renews_its_lease_is_alive(workdir, monkeypatch):
    monkeypatch.setattr(lease, "EXPIRES", 0.4)
    elsewhere(workdir)
    real, beats = lease.time.sleep, iter(range(1, 1000))

    def sleep(seconds):
        real(seconds)
        elsewhere(workdir, next(beats))

    monkeypatch.setattr(lease.time, "sleep", sleep)
    with pytest.raises(UserError, match="on other, since 2020"), lease.held(workdir):
        pass


@pytest.mark.parametrize("contents", [b"", b"\xff{", b"[]", b'{"id": 1}', b"[" * 5000])
def test_damaged_lease_expires(tmp_path, monkeypatch, contents):
    monkeypatch.setattr(lease, "EXPIRES", 0.1)
    (tmp_path / lease.FILE).write_bytes(contents)
    with lease.held(tmp_path):
        assert json.loads((tmp_path / lease.FILE).read_text())["pid"] == os.getpid()


def test_process_number_used_again_is_another_process(tmp_path):
    with lease.held(tmp_path):
        text = (tmp_path / lease.FILE).read_text()
    (tmp_path / lease.FILE).write_text(re.sub(r'"started": "\d+"', '"started": "1"', text))
    with lease.held(tmp_path):
        now = json.loads((tmp_path / lease.FILE).read_text())
        assert (now["pid"], now["id"] != json.loads(text)["id"]) == (os.getpid(), True)


def test_run_whose_lease_was_taken_ends(tmp_path):
    process = hold(tmp_path, stderr=subprocess.PIPE, before="lease._BEAT = 0.1")
    for _ in range(20):  # against a renewal that was under way
        elsewhere(epath.Path(tmp_path))
        try:
            process.wait(0.3)
            break
        except subprocess.TimeoutExpired:
            continue
    assert process.returncode == 2
    assert process.stderr is not None
    assert "on other" in process.stderr.read()


def test_taken_lease_is_noticed_before_the_workdir_is_written_to(workdir):
    with lease.held(workdir) as held:
        held.check()
        elsewhere(workdir)
        held.check(if_late=True)  # seen a moment ago: not looked at again
        with pytest.raises(UserError, match=r"Another run writes to .* on other"):
            held.check()
    assert json.loads((workdir / lease.FILE).read_text())["host"] == "other"  # left alone


@pytest.mark.parametrize("clock", lease._CLOCKS)
def test_lease_is_looked_at_when_any_clock_has_jumped(workdir, monkeypatch, clock):
    real, jump = lease.time.clock_gettime, [0.0]
    monkeypatch.setattr(
        lease.time, "clock_gettime", lambda each: real(each) + jump[0] * (each == clock)
    )
    with lease.held(workdir) as held:
        elsewhere(workdir)
        jump[0] = -3600.0
        held.check(if_late=True)
        jump[0] = lease.EXPIRES
        with pytest.raises(UserError, match="Another run writes to"):
            held.check(if_late=True)


def test_beats_go_on_when_a_clock_is_set_back(tmp_path, monkeypatch):
    real, jump = lease.time.clock_gettime, [0.0]
    monkeypatch.setattr(
        lease.time,
        "clock_gettime",
        lambda each: real(each) + jump[0] * (each == lease.time.CLOCK_REALTIME),
    )
    monkeypatch.setattr(lease, "_BEAT", 0.05)
    with lease.held(tmp_path):
        jump[0] = -3600.0
        deadline = time.monotonic() + 10
        while json.loads((tmp_path / lease.FILE).read_text())["beat"] < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_frozen_run_that_was_taken_for_dead_ends_when_it_wakes_up(tmp_path):
    process = hold(tmp_path, stderr=subprocess.PIPE, before="lease._BEAT = 6.0")
    process.send_signal(signal.SIGSTOP)
    time.sleep(6.5)  # one beat and more are missed
    elsewhere(epath.Path(tmp_path))
    began = time.monotonic()
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=30)
    assert time.monotonic() - began < 5.5  # not a beat later, but at once
    assert process.returncode == ExitCode.USER_ERROR
    assert "Another run writes to" in said
    assert json.loads((tmp_path / lease.FILE).read_text())["host"] == "other"


def test_lease_is_not_renewed_by_a_run_that_was_frozen_since_it_looked(tmp_path, monkeypatch):
    check = lease.Lease.check

    def frozen_after(self, **given):
        check(self, **given)
        elsewhere(epath.Path(tmp_path))
        self._seen = [at - lease.EXPIRES for at in self._seen]
        monkeypatch.setattr(lease.Lease, "check", check)

    monkeypatch.setattr(lease.Lease, "check", frozen_after)
    monkeypatch.setattr(lease.lifeline, "end", lambda *_: ended.set())
    monkeypatch.setattr(lease, "_BEAT", 0.1)
    ended = threading.Event()
    with lease.held(tmp_path):
        assert ended.wait(30)  # the next look tells
    assert json.loads((tmp_path / lease.FILE).read_text())["host"] == "other"


HOST = """
import sys, time
from clip_jax.common import commands, hosts
from clip_jax.training import lease
lease._BEAT = 0.2
workdir, coordinator, processes, process = sys.argv[1:]
with commands.plain_errors():
    hosts.join(coordinator, int(processes), int(process))
    with lease.held(workdir):
        print("held", flush=True)
        time.sleep(60)
"""


@pytest.mark.slow
def test_all_hosts_end_when_the_first_has_lost_the_lease(tmp_path):
    addresses = [[flag.partition("=")[2] for flag in each] for each in several_hosts.flags(2)]
    started = [
        several_hosts.launch(["-c", HOST, str(tmp_path), *each], devices=1) for each in addresses
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
    while any(process.poll() is None for process in started):  # against a renewal under way
        elsewhere(epath.Path(tmp_path))
        time.sleep(0.3)
    for ended in several_hosts.endings(started):
        assert ended.returncode == ExitCode.USER_ERROR
        assert "Another run writes to" in ended.stderr
        assert "on other" in ended.stderr


def test_watching_for_a_dead_holder_takes_no_clock(tmp_path, monkeypatch):
    """The one that watches is frozen for an hour: the holder's beats after that still count."""
    monkeypatch.setattr(lease, "EXPIRES", 0.4)
    elsewhere(epath.Path(tmp_path))
    real, naps = lease.time.sleep, iter(range(1, 1000))

    def sleep(seconds):
        real(seconds)
        nap = next(naps)
        if nap == 10:
            monotonic = time.monotonic
            monkeypatch.setattr(lease.time, "monotonic", lambda: monotonic() + 3600)
        if nap > 20:
            elsewhere(epath.Path(tmp_path), beat=1)

    monkeypatch.setattr(lease.time, "sleep", sleep)
    with pytest.raises(UserError, match="on other, since 2020"), lease.held(tmp_path):
        pass


def test_read_only_workdir_is_said_before_anything_slow(tmp_path, monkeypatch):
    def refuse(path, contents):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(workdirs.writing, "write", refuse)
    with pytest.raises(UserError, match=r"cannot be written to .*Read-only.*another --workdir"):
        workdirs.make(epath.Path(tmp_path))
