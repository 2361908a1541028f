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
