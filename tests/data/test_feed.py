"""Batches on the device: their values, threads that end, hangs that are named, time waited."""

import os
import subprocess
import sys
import textwrap
import threading
import time

import jax
import numpy as np
import pytest

from clip_jax.data.feed import Feed
from clip_jax.data.loading import Stages
from clip_jax.errors import DataStalled, UserError

DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def test_stages_name_the_oldest_work_first():
    now = iter([0.0, 10.0, 70.0])
    stages = Stages(clock=lambda: next(now))
    stages.enter("reading", "example 7")
    other = threading.Thread(target=stages.enter, args=("decoding", "00.tar/12"))
    other.start()
    other.join()
    assert stages.describe() == "reading example 7 for 70 s; decoding 00.tar/12 for 60 s"


def test_finished_work_is_not_named():
    stages = Stages()
    stages.enter("reading", "example 7")
    stages.leave()
    assert stages.describe() == "no thread is at work"


def test_a_hang_is_named():
    stages, released = Stages(), threading.Event()

    def batches():
        yield {"x": np.zeros(1)}
        stages.enter("reading", "example 7")
        released.wait(30)

    feed = Feed(batches(), DEVICE, 1, stall_timeout=0.3, describe=stages.describe)
    next(feed)
    with pytest.raises(
        DataStalled, match=r"0 s \(data\.stall_timeout\).*reading example 7 for \d s"
    ):
        next(feed)
    released.set()
    feed.close()


def test_waiting_is_measured():
    def batches():
        for _ in range(3):
            time.sleep(0.1)
            yield {"x": np.zeros(1)}

    feed = Feed(batches(), DEVICE, 1)
    for _ in feed:
        pass
    assert 0.25 < feed.waited < 2
    quick = Feed(iter([{"x": np.zeros(1)}] * 3), DEVICE, 3)
    next(quick)
    before = quick.waited
    time.sleep(0.2)
    next(quick)
    assert quick.waited - before < 0.1
    quick.close()


def test_leaving_a_pipeline_open_does_not_hang_the_exit():
    """Else TensorFlow's threads wait for an interpreter that has shut down."""
    program = """
        import jax
        from clip_jax import sharding
        from clip_jax.data.feed import Feed
        import test_pipeline as test
        mesh = sharding.make_mesh(data=-1, fsdp=1)
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        host = iter(test.make(test.Numbers(100), batch_size=16))
        next(host)
        device = Feed(test.make(test.Numbers(100), batch_size=16), place, depth=2)
        next(device)
        raise SystemExit(3)
    """
    here = os.path.dirname(__file__)
    env = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{os.environ['PYTHONPATH']}"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    run = subprocess.run(command, timeout=120, env=env, check=False)
    assert run.returncode == 3


@pytest.mark.slow
def test_a_hanging_run_ends_with_its_name(tmp_path):
    """A read that never returns must not keep the process, whatever threads it holds."""
    program = """
        import sys, time
        from clip_jax.data.sources import digits
        stored = digits.DigitScenes.__getitem__
        def read(self, index):
            return stored(self, index) if index != 5 else time.sleep(3600)
        digits.DigitScenes.__getitem__ = read
        from clip_jax.training import cli
        cli.main(sys.argv[1:])
    """
    arguments = ["--config=configs/vit_b32.py:smoke", f"--workdir={tmp_path}"]
    arguments += ["--config.data.order=stored", "--config.data.stall_timeout=3.0"]
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 42
    assert "reading example 5" in run.stderr
    assert "Traceback" not in run.stderr


def transfer_threads() -> int:
    return sum(thread.name == "feed" for thread in threading.enumerate())


class TestToDevice:
    @pytest.fixture
    def sharded(self, mesh8):
        return jax.sharding.NamedSharding(mesh8, jax.sharding.PartitionSpec(("data", "fsdp")))

    def test_values_and_placement(self, sharded):
        host = [
            {"x": np.arange(16) + step, "y": np.full((16, 2), step, np.uint8)} for step in range(3)
        ]
        moved = Feed(iter(host), sharded, depth=2)
        for expected in host:
            on_device = next(moved)
            for name in ("x", "y"):
                assert on_device[name].sharding == sharded
                assert on_device[name].addressable_shards[0].data.shape[0] == 2
                np.testing.assert_array_equal(on_device[name], expected[name])
        moved.close()
        assert transfer_threads() == 0

    def test_ends_with_its_input(self, sharded):
        batches = [{"x": np.full((8,), i)} for i in range(5)]
        moved = list(Feed(iter(batches), sharded, depth=2))
        assert [int(batch["x"][0]) for batch in moved] == list(range(5))
        assert transfer_threads() == 0

    def test_errors_reach_the_consumer_in_turn(self, sharded):
        def batches():
            yield {"x": np.zeros(8)}
            raise UserError("out of data")

        moved = Feed(batches(), sharded, depth=2)
        next(moved)
        with pytest.raises(UserError, match="out of data"):
            next(moved)
        assert transfer_threads() == 0

    def test_reads_no_further_ahead_than_told(self, sharded):
        read_ahead = []

        def batches():
            for i in range(100):
                read_ahead.append(i)
                yield {"x": np.zeros(8)}

        moved = Feed(batches(), sharded, depth=2)
        next(moved)
        time.sleep(0.3)
        assert len(read_ahead) <= 1 + 2 + 1  # handed out, ready, waiting for a place
        moved.close()
        assert transfer_threads() == 0
