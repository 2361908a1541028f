"""A pipeline that hangs is named, and one that is slow is measured."""

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
from clip_jax.data.stages import Stages
from clip_jax.errors import DataStalled

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
    assert run.returncode == 1
    assert "reading example 5" in run.stderr
    assert "Traceback" not in run.stderr
