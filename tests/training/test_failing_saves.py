"""Saves onto a full disk, without rights, and into a bucket that is gone: training goes on."""

import errno
import json
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator

import orbax.checkpoint as ocp
import pytest
import tiny_run
from several_hosts import endings, flags, launch
from test_checkpoint import META, abstract, assert_same, kept, make_state

from clip_jax import checkpoint
from clip_jax.errors import ExitCode, StorageError, StorageRefused
from clip_jax.training import loop, train


@pytest.fixture
def disk(tmp_path) -> Iterator[pathlib.Path]:
    """A disk of 150 MiB, more than a tiny run takes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=150m", "tmpfs", place]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(place: pathlib.Path) -> pathlib.Path:
    """Writes a file that leaves no space."""
    path = place / "filler"
    with path.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**20))
        except OSError:
            return path


@pytest.fixture
def quick(monkeypatch) -> None:
    """Tries again after a tenth of a second."""
    monkeypatch.setattr(checkpoint.writes, "_LONGEST_WAIT", 0.1)


def test_a_full_disk(disk, quick):
    said = []
    with checkpoint.Checkpoints(disk / "run", report=lambda *each: said.append(each)) as store:
        store.save(make_state(), 1, META, {})
        assert store.finish()
        filler = fill(disk)
        store.save(make_state(), 2, META, {})
        assert not store.finish()
        store.save(make_state(), 3, META, {})
        assert not store.finish()
        assert store.lost()
        assert store.steps() == [1]
        filler.unlink()
        store.save(make_state(), 4, META, {})
        assert store.finish()
        assert not store.lost()
        assert store.steps() == [4]
    assert kept(disk / "run") == [4]  # and no folder that is half written
    (failing, first), (_, second) = said
    assert failing == 2
    assert first.startswith(
        f"A checkpoint could not be written to {disk}/run/checkpoints: No space"
    )
    assert "Free space on that disk. Training goes on" in first
    assert "within 1h 00m" in first
    assert "are written to" in second
    assert "2 failures" in second
    with checkpoint.Checkpoints(disk / "run", create=False) as store:
        assert_same(store.restore(4, abstract((1, 1))), make_state())


@pytest.mark.parametrize("hurry", [False, True], ids=["limit", "asked to end"])
def test_a_disk_that_stays_full(disk, quick, monkeypatch, hurry: bool):
    """The error, in the end, says what to do and exits with the code for a restart."""
    monkeypatch.setattr(checkpoint.writes, "_GRACE", 0.3)
    limit = 3600.0 if hurry else 0.3
    store = checkpoint.Checkpoints(disk / "run", give_up_after=limit, report=lambda *_: None)
    fill(disk)

    def save() -> None:
        for step in range(1, 100):
            store.save(make_state(), step, META, {})
            store.finish(hurry=hurry)

    with pytest.raises(StorageError, match=r"No space left on device\. Free space.*same command"):
        save()
    assert StorageError.exit_code == ExitCode.RESUME


def test_a_disk_mounted_read_only(disk, quick):
    said = []
    store = checkpoint.Checkpoints(
        disk / "run", give_up_after=0.3, report=lambda *each: said.append(each)
    )
    with store:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        store.save(make_state(), 1, META, {})
        assert not store.finish()
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        store.save(make_state(), 2, META, {})
        assert store.finish()
        assert "Read-only file system. Mount it for writing." in said[0][1]
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)

        def save() -> None:
            for step in range(3, 100):
                store.save(make_state(), step, META, {})
                store.finish()

        with pytest.raises(StorageRefused, match="Read-only file system"):
            save()
    assert StorageRefused.exit_code == ExitCode.USER_ERROR


# As Python words it, and as TensorStore does.
QUOTA = {
    "Python": OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    "TensorStore": ValueError(
        f"RESOURCE_EXHAUSTED: Failed to write: Disk quota exceeded [os_error_code='{errno.EDQUOT}']"
    ),
}


@pytest.mark.parametrize("name", QUOTA)
def test_a_quota_that_is_used_up(tmp_path, quick, monkeypatch, name: str):
    said = []
    with checkpoint.Checkpoints(tmp_path, report=lambda *each: said.append(each)) as store:
        with monkeypatch.context() as patched:

            async def fail(*_) -> None:
                raise QUOTA[name]

            patched.setattr(ocp.JsonCheckpointHandler, "_save_fn", fail)
            store.save(make_state(), 1, META, {})
            assert not store.finish()
        store.save(make_state(), 2, META, {})
        assert store.finish()
        assert store.steps() == [2]
        assert_same(store.restore(2, abstract((1, 1))), make_state())
    (step, first), (_, second) = said
    assert step == 1
    assert "Disk quota exceeded. Free space within your quota" in first
    assert "again, after" in second


def test_an_error_of_the_program_is_raised(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as store, pytest.raises(TypeError):
        store.save(make_state(), 1, {**META, "set": {1}}, {})


def test_what_a_killed_save_left_is_removed(tmp_path):
    """Removes leftovers of other steps too, since saves by the clock fall on any step."""
    left = tmp_path / checkpoint.DIRECTORY / "7.orbax-checkpoint-tmp"
    (left / "model").mkdir(parents=True)
    with checkpoint.Checkpoints(tmp_path, create=False):
        assert left.exists()  # a reader must not touch the save of a run
    with checkpoint.Checkpoints(tmp_path):
        assert not left.exists()


def test_a_run_on_a_full_disk(disk, quick, capsys, caplog):
    """It trains on; once there is space, no row and no event is missing."""
    whole = tiny_run.read_metrics(tiny_run.finished())
    filled: list[pathlib.Path] = []
    made = tiny_run.config({"log.tensorboard": True, "checkpoint.every": "2 steps"})
    before = loop.Loop._save

    def save(self, state, step, *rest):
        if step == 4:
            filled.append(fill(disk))
        if step == 10:
            filled[0].unlink()
        before(self, state, step, *rest)

    with pytest.MonkeyPatch.context() as patch, tiny_run.compile_once():
        patch.setattr(loop.Loop, "_save", save)
        train.train(made, disk / "run")
    printed = capsys.readouterr().out
    assert "No space left on device. Free space on that disk. Training goes on" in printed
    assert "are written to" in printed
    assert "No space left on device while logging" in caplog.text
    found = tiny_run.read_metrics(disk / "run")
    assert found.keys() == whole.keys()
    assert all(found[key] == whole[key] for key in whole if key[1] == "train/loss")
    assert kept(disk / "run")[-1] == 12
    (start,) = (disk / "run/starts").iterdir()
    texts = [event["text"] for event in json.loads(start.read_text())["events"]]
    assert "Training goes on" in texts[0]
    assert "again, after" in texts[-1]


# ---- Two hosts ---------------------------------------------------------------------------------

HOST = """
import argparse
import pathlib
import resource
import signal
import subprocess
import sys
from clip_jax.common import hosts
sys.path[:0] = ["tests/support", "tests/training"]
parser = argparse.ArgumentParser()
hosts.add_hosts(parser)
parser.add_argument("--disk")
parser.add_argument("--fault")
options = parser.parse_args()
hosts.join_hosts(options)
import jax
import numpy as np
import test_failing_saves as test
from several_hosts import endings, flags, launch
from test_checkpoint import META, abstract, make_state
from clip_jax import checkpoint
disk, state = pathlib.Path(options.disk), make_state(axes=(1, 4))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def fault(begins):
    if options.fault == "limit" and options.process == 1:  # of this host alone
        limit = 1000 if begins else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if options.fault == "full" and options.process == 0:
        test.fill(disk) if begins else (disk / "filler").unlink()
    if options.fault == "read-only" and options.process == 0:
        mode = "remount,ro" if begins else "remount,rw"
        subprocess.run(["mount", "-o", mode, disk], check=True)
    hosts.gather("done")

with checkpoint.Checkpoints(disk / "run", report=lambda *said: print(*said)) as store:
    store.save(state, 1, META, {})
    assert store.finish()
    fault(True)
    for step in (2, 3):
        store.save(state, step, META, {})
        assert not store.finish()
        assert store.steps() == [1]
    fault(False)
    store.save(state, 4, META, {})
    assert store.finish()
    assert store.steps() == [4]
    found = jax.tree.leaves(store.restore(4, abstract((1, 4))))
    for one, other in zip(found, jax.tree.leaves(state), strict=True):
        for own, wanted in zip(one.addressable_shards, other.addressable_shards, strict=True):
            assert np.asarray(own.data).tobytes() == np.asarray(wanted.data).tobytes()
    print("written")
"""


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("limit", "Host 1: File too large"),
        pytest.param("full", "No space left on device", marks=pytest.mark.slow),
        pytest.param("read-only", "Read-only file system", marks=pytest.mark.slow),
    ],
)
def test_two_hosts_give_up_a_save_together(disk, fault: str, reason: str):
    """A fault of one host or of both: none waits for the other, and the next save is written."""
    command = ["-c", HOST, f"--disk={disk}", f"--fault={fault}"]
    ended = endings([launch([*command, *own], devices=2) for own in flags(2)])
    assert [each.returncode for each in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    # Gloo's threads print how many peer ranks they are connected to, in lines torn at times.
    first = [line for line in ended[0].stdout.splitlines() if "peer ranks" not in line]
    assert " A checkpoint could not be written to" in first[0]
    assert reason in first[0]
    assert "again, after" in first[1]
    assert [each.stdout.splitlines()[-1] for each in ended] == ["written"] * 2
    assert "Traceback" not in ended[0].stderr + ended[1].stderr


HOST_RUN = """
import pathlib
import sys
sys.path[:0] = ["tests/support", "tests/training"]
import test_failing_saves as test
from clip_jax import checkpoint
from clip_jax.training import cli, loop
disk, before = pathlib.Path(sys.argv.pop(1)), loop.Loop._save
checkpoint.writes._LONGEST_WAIT = 0.1

def save(self, state, step, *rest):
    if step == 4 and "--process=0" in sys.argv:
        test.fill(disk)
    if step >= 10 and "--process=0" in sys.argv:
        (disk / "filler").unlink(missing_ok=True)
    before(self, state, step, *rest)

loop.Loop._save = save
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_hosts_train_on_a_full_disk(disk):
    given = {**tiny_run.SETTINGS, "checkpoint.every": "2 steps", "duration": "16 steps"}
    command = ["-c", HOST_RUN, str(disk), "--config=configs/vit_b32.py:smoke"]
    command += [f"--workdir={disk}/run", *(f"--config.{n}={value}" for n, value in given.items())]
    ended = endings([launch([*command, *own], devices=1) for own in flags(2)])
    assert [each.returncode for each in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    found = tiny_run.read_metrics(disk / "run")
    assert [step for step, name in found if name == "train/loss"] == list(range(1, 17))
    assert kept(disk / "run")[-1] == 16
    (start,) = (disk / "run/starts").iterdir()
    texts = [event["text"] for event in json.loads(start.read_text())["events"]]
    assert "No space left on device" in texts[0]
    assert "Training goes on" in texts[0]
    assert "again, after" in texts[-1]
