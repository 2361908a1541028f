"""Damaged checkpoints in a resume: the one before is taken, loudly, on all hosts."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import tiny_run
from several_hosts import endings, flags, launch
from test_checkpoint import META, abstract, assert_same, make_state, save

from clip_jax import checkpoint
from clip_jax.checkpoint import reading
from clip_jax.errors import StorageError, UserError
from clip_jax.training import train

# Reads that failed halfway leave futures behind, of which the collector complains.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, {4: {}, 8: {}, 12: {}}, keep=3)
    return workdir


@pytest.fixture
def workdir(saved, tmp_path) -> pathlib.Path:
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def folder(workdir: pathlib.Path, step: int) -> pathlib.Path:
    return workdir / checkpoint.DIRECTORY / str(step)


def largest(folder: pathlib.Path) -> pathlib.Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: pathlib.Path, place: float = 0.5) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[int(place * len(damaged))] ^= 0x10
    path.write_bytes(damaged)


def resume(workdir: pathlib.Path) -> tuple[checkpoint.Restored, list[tuple[int, str]]]:
    """Returns what a resume takes, and what it says."""
    said: list[tuple[int, str]] = []
    with checkpoint.Checkpoints(
        workdir, keep=3, report=lambda step, text: said.append((step, text))
    ) as store:
        found = store.restore_latest(abstract((1, 1)))
        assert store.latest_step() == found.step
    return found, said


DAMAGE = {
    "flipped": lambda f: flip(largest(f / "model")),
    "cut short": lambda f: largest(f).write_bytes(largest(f).read_bytes()[:1000]),
    "empty": lambda f: (shutil.rmtree(f), f.mkdir()),
    "no optimizer": lambda f: shutil.rmtree(f / "optimizer"),
    "no meta": lambda f: (f / "meta/metadata").unlink(),
    "meta flipped": lambda f: flip(f / "meta/metadata"),
    "meta another": lambda f: (f / "meta/metadata").write_text("[]"),
    "a name": lambda f: replace(f / "model/_METADATA", "logit_scale", "logit_scald"),
}


def replace(path: pathlib.Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "how",
    [
        how if how in ("flipped", "no meta") else pytest.param(how, marks=pytest.mark.slow)
        for how in DAMAGE
    ],
)
def test_the_one_before_is_taken(workdir, how: str):
    DAMAGE[how](folder(workdir, 12))
    found, said = resume(workdir)
    assert found.step == 8
    assert found.meta["step"] == 8
    assert_same(found.state, make_state())
    ((step, sentence),) = said
    assert step == 8
    assert sentence.startswith("The checkpoint of step 12 cannot be read: ")
    assert "resumes from that of step 8, and the 4 steps after it are trained again" in sentence
    assert f"moved to {workdir / 'damaged/12'}" in sentence
    assert (workdir / "damaged/12").is_dir()
    assert not folder(workdir, 12).exists()
    assert resume(workdir)[1] == []  # said once


def test_a_later_save_of_that_step(workdir):
    """It does not collide with the damaged one, not even when it is damaged too."""
    for name in ("12", "12-1"):
        flip(largest(folder(workdir, 12) / "optimizer"))
        with checkpoint.Checkpoints(workdir, keep=3, report=lambda *_: None) as store:
            assert store.restore_latest(abstract((1, 1))).step == 8
            store.save(make_state(), 12, META, {})
            assert store.finish()
            assert store.steps() == [4, 8, 12]
        assert (workdir / "damaged" / name).is_dir()
        found, said = resume(workdir)
        assert (found.step, said) == (12, [])


def test_two_are_damaged(workdir):
    flip(largest(folder(workdir, 12) / "model"))
    shutil.rmtree(folder(workdir, 8) / "model")
    found, said = resume(workdir)
    assert found.step == 4
    assert [text.split(" cannot")[0][-2:].strip() for _, text in said] == ["12", "8"]


def test_all_are_damaged(workdir):
    """An error, again and again: never a fresh start, and nothing is moved."""
    for step in (4, 8, 12):
        shutil.rmtree(folder(workdir, step) / "optimizer")
    for _ in range(2):
        with pytest.raises(UserError, match=r"None of the 3 .*step 12, .*step 4, .*--workdir"):
            resume(workdir)
    assert not (workdir / "damaged").exists()


def test_the_only_one_is_damaged(workdir):
    for step in (4, 8):
        shutil.rmtree(folder(workdir, step))
    flip(largest(folder(workdir, 12) / "model"))
    with pytest.raises(UserError, match="To start afresh, delete that folder"):
        resume(workdir)


def test_another_model_is_no_damage(workdir):
    with (
        checkpoint.Checkpoints(workdir) as store,
        pytest.raises(UserError, match=r"None of the 3.*of another model.*Put back settings"),
    ):
        store.restore_latest(abstract((1, 1), "resnet"))
    assert not (workdir / "damaged").exists()


def test_nan_in_a_checkpoint_without_checksums(workdir, monkeypatch):
    """Earlier versions wrote such checkpoints without looking at the values."""
    monkeypatch.setattr(reading, "OWN", "other")
    state = make_state()
    state = state.replace(params={**state.params, "logit_scale": np.float32("nan")})
    found = checkpoint.store.checksums.Inspected({}, [])
    monkeypatch.setattr(checkpoint.store.checksums, "inspect", lambda tree: found)
    save(workdir, {16: {}}, keep=3)
    with checkpoint.Checkpoints(workdir, keep=3) as store:
        store.save(state, 20, META, {})
    monkeypatch.undo()
    found, said = resume(workdir)
    assert found.step == 16
    assert "1 arrays hold NaN or infinity, such as model/params/logit_scale" in said[0][1]


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied"),
        OSError(24, "Too many open files"),
        ValueError("UNKNOWN: reading: Stale file handle [os_error_code='116']"),
    ],
    ids=["rights", "files", "stale"],
)
def test_storage_that_fails_is_no_damage(workdir, error: Exception, monkeypatch):
    """Nothing is moved, and no step is lost, because a file cannot be read just now."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(reading.ocp.CompositeCheckpointHandler, "restore", fail)
    with pytest.raises(StorageError, match=r"checkpoints/12 could not be read"):
        resume(workdir)
    assert not (workdir / "damaged").exists()


FLIPS = 60


@pytest.mark.slow
def test_a_flip_in_any_file(workdir):
    """This step bit for bit, or the one before with a sentence."""
    rng, whole = np.random.default_rng(1), workdir.with_name("whole")
    workdir.rename(whole)
    files = sorted(p.relative_to(whole) for p in folder(whole, 12).rglob("*") if p.is_file())
    back = 0
    for n in range(FLIPS):
        shutil.copytree(whole, workdir)
        path = workdir / files[n % len(files)]
        data = bytearray(path.read_bytes())
        if n % 5 == 4:
            del data[rng.integers(len(data)) :]
        elif data:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        found, said = resume(workdir)
        assert (found.step, len(said)) in [(12, 0), (8, 1)], path
        assert_same(found.state, make_state())
        assert {name: found.meta[name] for name in META} == META
        back += len(said)
        shutil.rmtree(workdir)
    assert back > FLIPS / 6


# ---- Whole runs --------------------------------------------------------------------------------


def test_a_run_goes_on_from_the_one_before(tmp_path, capsys):
    """Its rows and its last state are those of the run that was not damaged."""
    shutil.copytree(tiny_run.finished(), tmp_path / "run")
    flip(largest(folder(tmp_path / "run", 12) / "model"))
    with tiny_run.compile_once():
        train.train(tiny_run.config(), tmp_path / "run")
    printed = capsys.readouterr().out
    assert "The checkpoint of step 12 cannot be read: " in printed
    assert "from step 8." in printed
    assert "is finished" not in printed
    found = tiny_run.read_metrics(tmp_path / "run")
    wanted = tiny_run.read_metrics(tiny_run.finished())
    assert found.keys() == wanted.keys()
    learned = [key for key in wanted if key[1].startswith(("train/loss", "zeroshot", "retrieval"))]
    assert [found[key] for key in learned] == [wanted[key] for key in learned]
    starts = sorted((tmp_path / "run/starts").iterdir())
    (event,) = json.loads(starts[-1].read_text())["events"]
    assert event["step"] == 8
    assert "checkpoint of step 12 cannot be read" in event["text"]


HOST = """
import sys
import jax
from clip_jax.common import hosts
sys.path[:0] = ["tests/support", "tests/training"]
import argparse
parser = argparse.ArgumentParser()
hosts.add_hosts(parser)
parser.add_argument("--workdir")
options = parser.parse_args()
hosts.join_hosts(options)
from clip_jax import checkpoint
from clip_jax.checkpoint import reading
from test_checkpoint import abstract
import numpy as np
if options.process == 1:  # this host alone sees step 12 cut short, and step 8 another way
    whole = reading.read
    def read(folder, **args):
        if folder.name == "12":
            raise reading.Unreadable("a file is cut short")
        return whole(folder, **args)
    reading.read = read
with checkpoint.Checkpoints(options.workdir, keep=3, report=lambda *said: print(*said)) as store:
    found = store.restore_latest(abstract((4, 1)))
    total = sum(float(np.abs(x.addressable_data(0)).sum()) for x in jax.tree.leaves(found.state))
    print("took", found.step, store.steps(), total)
"""


def test_one_host_alone_sees_the_damage(workdir):
    """All take the one before, and one of them moves the damaged one."""
    commands = [["-c", HOST, *each, f"--workdir={workdir}"] for each in flags(2)]
    ended = endings([launch(command, devices=2) for command in commands])
    assert [each.returncode for each in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    first, second = (each.stdout.splitlines() for each in ended)
    assert first[-1].startswith("took 8 [4, 8] ")
    assert first[-1] == second[-1]
    assert "The checkpoint of step 12 cannot be read: host 1 says that a file is cut" in first[-2]
    assert (workdir / "damaged/12").is_dir()
