"""Rows loaded by processes of their own: those that threads load, and every failure explained."""

import collections
import dataclasses
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from shards import sample, write_tar

from clip_jax.configs import default
from clip_jax.data import mixture, order, pipeline, rows, tokenizer
from clip_jax.data.feed import Feed
from clip_jax.data.sources import base, synthetic, tar
from clip_jax.errors import DataStalled, UserError

BATCH, EACH = 20, 25  # rows; samples in each of 4 shards
SHAPE = {"image_size": 8, "seed": 3, "batch_size": BATCH}
BAD = {"7": (b"", "empty image file"), "11": (b"<html>", "HTML instead of an image")}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Shards with two bad samples each, and one whose caption is too long for 8 ids."""
    path = tmp_path_factory.mktemp("shards")
    for shard in range(4):
        members = []
        for i in range(EACH):
            text = f"number {shard} {i}" if i != 3 else "a long " * 9
            members += sample(f"{i}", text, shade=40 * shard + i)
        members = [
            (n, BAD[n[:-4]][0] if n[:-4] in BAD and n[-3:] == "png" else d) for n, d in members
        ]
        write_tar(path / f"{shard}.tar", members)
    return path


def start(path: Path, processes: int, **overrides) -> pipeline.TrainPipeline:
    begin = overrides.pop("start", 0)
    config = default.get_config().data
    config.source = default.source(type="tar", path=str(path))
    config.update(
        {"threads": 4, "processes": processes, "chunk": 5, "shuffle_window": 40, **overrides}
    )
    source, order_ = mixture.create(config, 8, 3, batch_size=BATCH, parts=1)
    spec = rows.Spec(config, "openai", 8, **SHAPE)
    tokens = tokenizer.create("openai", 8)
    return pipeline.TrainPipeline(source, order_, tokens, spec, start=begin)


@pytest.mark.parametrize("order_name", ["shuffled", "windowed"])
@pytest.mark.parametrize("processes", [1, 3])
def test_batches_are_those_of_threads(shards, order_name, processes):
    wanted = start(shards, 0, order=order_name, start=100)
    run = start(shards, processes, order=order_name, start=100)
    batches = iter(run)
    for want, got in itertools.islice(zip(wanted, batches), 10):  # twice all examples
        assert want.keys() == got.keys()
        for name, array in want.items():
            np.testing.assert_array_equal(got[name], array)
    batches.close()
    reasons = {reason for _, reason in BAD.values()}
    assert run.skipped.keys() == wanted.skipped.keys() == reasons
    # Each reason holds for 4 of 100, and under 100 have been read ahead.
    assert all(8 <= count <= 12 for count in run.skipped.values())
    assert 8 <= run.truncated <= 12 + run.skipped.total()  # a replacement may be cut too


@pytest.mark.parametrize(("cores", "expected"), [(2, 0), (12, 0), (16, 4), (224, 56)])
def test_many_cores_have_processes_unless_asked_otherwise(cores, expected, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert pipeline.count_processes(default.get_config().data.processes) == expected
    assert pipeline.count_processes(0) == 0
    assert pipeline.count_processes(3) == 3


@pytest.mark.parametrize("processes", [2, 3])
def test_a_process_reads_a_chunk_once_an_epoch(shards, processes, monkeypatch):
    """The order is windowed, and processes may share a stream; here they run in sequence."""
    run = start(shards, processes, order="windowed")
    read: list[int] = []
    start_chunk = tar.TarShards._start_chunk

    def counted(source, number):
        read.append(number)
        return start_chunk(source, number)

    monkeypatch.setattr(tar.TarShards, "_start_chunk", counted)
    for process in range(processes):
        read.clear()
        opened = dataclasses.replace(run._spec, parts=processes).open()
        own = range(BATCH * process // processes, BATCH * (process + 1) // processes)
        for step in range(4 * EACH * 3 // BATCH):  # three epochs
            for row in own:
                opened[run._positions[step * BATCH + row]]
        counts = collections.Counter(read)
        assert len(counts) > 10
        assert max(counts.values()) <= 3


def test_too_many_bad_examples_end_the_run(shards):
    batches = iter(start(shards, 2, max_skipped=0.05, order="stored"))
    with pytest.raises(UserError, match=r"max_skipped = 0\.05 allows.*0\.tar/7"):
        collections.deque(itertools.islice(batches, 20), maxlen=0)


def test_without_any_usable_example(tmp_path):
    write_tar(tmp_path / "0.tar", [("0.png", b""), ("0.txt", b"x")] * 1)
    with pytest.raises(UserError, match=r"Hardly any example.*1 empty image file"):
        next(iter(start(tmp_path, 2, max_skipped=1.0)))


def test_a_process_does_without_jax():
    """JAX would claim the accelerator, and take half a second."""
    program = "import sys, clip_jax.data.processes; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_closing_ends_the_processes(shards):
    run = start(shards, 2)
    batches = iter(run)
    next(batches)
    assert len(loaders()) == 2
    batches.close()
    assert not loaders()


def loaders() -> list[int]:
    """Returns the ids of the processes that load and are alive."""
    return [process.pid for process in multiprocessing.active_children()]


def test_a_process_that_is_killed_is_explained(shards):
    run = start(shards, 2)
    batches = iter(run)
    next(batches)
    os.kill(loaders()[1], signal.SIGKILL)
    with pytest.raises(UserError, match=r"exit status -9.*memory.*data\.processes"):
        collections.deque(itertools.islice(batches, 20), maxlen=0)
    assert not loaders()


# ---- Data that fail in other ways --------------------------------------------------------------


class Trap(synthetic.Synthetic):
    """Example 5 hangs, or is a bug."""

    def __init__(self, kind: str):
        super().__init__(100, 8, 0)
        self._kind = kind

    def __getitem__(self, index: int) -> base.Example:
        if index == 5:
            if self._kind == "bug":
                raise ZeroDivisionError("of example five")
            time.sleep(1000)
        return super().__getitem__(index)


@dataclasses.dataclass(frozen=True)
class TrapSpec(rows.Spec):
    """Opens a trap in another process."""

    kind: str = "none"

    def open(self) -> rows.Rows:
        if self.kind == "gone":
            raise UserError("The data are gone.")
        tokens = tokenizer.create("openai", 8)
        return self.bind(Trap(self.kind), order.Stored(100), tokens)


def trapped(kind: str) -> pipeline.TrainPipeline:
    config = default.get_config().data
    config.update(processes=1, threads=2)
    spec = TrapSpec(config, "openai", 8, kind=kind, **SHAPE)
    tokens = tokenizer.create("openai", 8)
    return pipeline.TrainPipeline(Trap("none"), order.Stored(100), tokens, spec)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("gone", UserError, r"The data are gone\."),
        ("bug", RuntimeError, r"(?s)__getitem__.*ZeroDivisionError: of example five"),
    ],
)
def test_an_error_in_a_process_is_raised_here(kind, error, message):
    with pytest.raises(error, match=message):
        next(iter(trapped(kind)))


def test_a_hang_is_named():
    run = trapped("hang")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    feed = Feed(run, place, 1, stall_timeout=6, describe=run.describe)
    with pytest.raises(DataStalled, match=r"loading 0: reading example 5 for \d s"):
        next(feed)
    feed.close()


# ---- A trainer that is killed ------------------------------------------------------------------


def run_until_killed(path: str) -> None:
    run = start(Path(path), 2)
    batches = iter(run)
    next(batches)
    print(*loaders(), flush=True)
    time.sleep(1000)


def test_no_process_outlives_a_killed_trainer(shards):
    program = "import sys, test_processes as t; t.run_until_killed(sys.argv[1])"
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{os.environ['PYTHONPATH']}"}
    command = [sys.executable, "-c", program, str(shards)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as trainer:
        try:
            pids = [int(pid) for pid in trainer.stdout.readline().split()]
            assert len(pids) == 2
        finally:
            trainer.kill()
    deadline = time.monotonic() + 20
    while any(map(running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(pid: int) -> bool:
    state = subprocess.run(["ps", "-p", str(pid), "-o", "stat="], capture_output=True, text=True)
    return bool(state.stdout.strip()) and not state.stdout.startswith("Z")
