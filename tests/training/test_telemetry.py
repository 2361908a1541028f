"""Speed per chip, MFU and memory in the rows; traces."""

import contextlib
import dataclasses
import importlib.util
import os
import subprocess
import sys
import threading
import types
from importlib import metadata

import jax
import jax.numpy as jnp
import pytest
import tiny
from packaging.requirements import Requirement
from packaging.version import Version

from clip_jax import models
from clip_jax.common import hardware
from clip_jax.models import flops
from clip_jax.plan import chips
from clip_jax.training import telemetry, tracer


@dataclasses.dataclass
class FakeDevice:
    device_kind: str
    used: int

    def memory_stats(self):
        return {"bytes_in_use": self.used, "peak_bytes_in_use": 2 * self.used, "largest": 1}


def fake_mesh(kind: str, count: int):
    return types.SimpleNamespace(
        size=count, devices=types.SimpleNamespace(flat=[FakeDevice(kind, 0)] * count)
    )


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A1000", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_peaks(kind: str, teraflops: float | None):
    assert hardware.peak_flops(kind) == (teraflops and pytest.approx(teraflops * 1e12))


def test_peaks_are_those_that_the_planner_takes():
    for name, chip in chips.CHIPS.items():
        kind = name.replace("tpu", "TPU") if "tpu" in name else f"TPU {name}"
        assert hardware.peak_flops(kind) == chip.flops, name


def test_mfu():
    """ViT-L/14 needs 3 x 175.3 GFLOPs a pair (open_clip's table: 81 + 6.7 GMACs)."""
    size = models.get_size("ViT-L/14")
    row = telemetry.Telemetry(size, 4096, 1, fake_mesh("TPU v5 lite", 16)).measure(2500.0)
    assert row["train/images_per_second_per_chip"] == 156.25
    per_pair = flops.step_flops(size, 4096, 1) / 4096
    assert per_pair == pytest.approx(3 * 175.3e9, rel=0.02)
    assert row["train/mfu"] == pytest.approx(156.25 * per_pair / 197e12)
    assert 0.4 < row["train/mfu"] < 0.43


def test_no_mfu_without_a_known_peak():
    size = tiny.make_net("vit").size
    row = telemetry.Telemetry(size, 16, 1, tiny.make_mesh(2, 4)).measure(80.0)
    assert row["train/images_per_second_per_chip"] == 10
    assert "train/mfu" not in row
    assert not any(name.startswith("device/") for name in row)  # a CPU does not tell


def test_device_memory_is_that_of_the_fullest():
    devices = [FakeDevice("x", 2**30), FakeDevice("x", 3 * 2**30)]
    assert hardware.device_memory(devices) == {"memory_gib": 3.0, "peak_memory_gib": 6.0}
    silent = types.SimpleNamespace(memory_stats=lambda: None)
    assert hardware.device_memory([silent]) == {}


def test_process_usage(tmp_path):
    """50 files, 50 threads and 256 MiB more are seen; others may come and go meanwhile."""
    before = hardware.process_usage()
    held = b"x" * 2**28
    stop = threading.Event()
    threads = [threading.Thread(target=stop.wait) for _ in range(50)]
    for thread in threads:
        thread.start()
    with contextlib.ExitStack() as stack:
        for number in range(50):
            stack.enter_context((tmp_path / str(number)).open("w"))
        after = hardware.process_usage()
    stop.set()
    for thread in threads:
        thread.join()
    assert after["threads"] - before["threads"] == pytest.approx(50, abs=10)
    assert after["descriptors"] - before["descriptors"] == pytest.approx(50, abs=10)
    assert after["memory_gib"] - before["memory_gib"] == pytest.approx(0.25, abs=0.05)
    del held


# ---- Traces --------------------------------------------------------------------------------------


def run_steps(made: tracer.Tracer, steps: range) -> None:
    add = jax.jit(lambda x: x + 1)
    value = jnp.zeros(())
    for step in steps:
        with made.step(step):
            value = add(value)
        made.after(step, value)
    made.close()


@pytest.fixture
def traceable():
    """Skips where an earlier test has loaded a libtpu that does not go with this JAX."""
    if reason := tracer.mismatch():
        pytest.skip(reason)


def events(path) -> list[str]:
    """Names of all events in a trace."""
    data = jax.profiler.ProfileData.from_file(str(path))
    return [event.name for plane in data.planes for line in plane.lines for event in line.events]


@pytest.mark.usefixtures("traceable")
def test_a_trace_when_due_and_one_on_request(tmp_path):
    said: list[str] = []
    made = tracer.Tracer(tmp_path, due=3, steps=2, say=said.append)
    run_steps(made, range(1, 6))
    made.start(6)
    run_steps(made, range(6, 7))  # the run ends within it
    profiles = tmp_path / "traces" / "plugins" / "profile"
    assert sorted(path.name for path in profiles.iterdir()) == ["step_00000003", "step_00000006"]
    for step, text in zip((3, 6), said, strict=True):
        (file,) = (profiles / f"step_{step:08}").iterdir()
        assert file.name.endswith(".xplane.pb")
        assert f"Traced from step {step} on: {profiles}" in text
        assert f"xprof --logdir {tmp_path / 'traces'}" in text
    (file,) = (profiles / "step_00000003").iterdir()
    assert events(file).count("train") == 2  # the marks of the steps


@pytest.mark.usefixtures("traceable")
def test_a_trace_in_a_bucket(bucket):
    made = tracer.Tracer("gs://bucket/traced", due=1, steps=1, say=print)
    run_steps(made, range(1, 3))
    (name,) = bucket.names("bucket", "traced/")
    assert name.startswith("traced/traces/plugins/profile/step_00000001/")
    assert name.endswith(".xplane.pb")


@pytest.mark.usefixtures("traceable")
def test_a_trace_that_fails_costs_no_step(tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("Only one profile may be run at a time.")

    made = tracer.Tracer(tmp_path, due=1, steps=2, say=print)
    monkeypatch.setattr(jax.profiler, "start_trace", fail)
    run_steps(made, range(1, 4))
    assert "No trace of step 1 could be begun: Only one profile" in caplog.text
    monkeypatch.undo()
    (tmp_path / "traces").write_text("a file where the folder must be")
    made = tracer.Tracer(tmp_path, due=1, steps=2, say=print)
    run_steps(made, range(1, 4))
    assert "The trace from step 1 on could not be written" in caplog.text


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)
@pytest.mark.parametrize("version", ["", "0.0.1"])
def test_another_libtpu_crashes_no_run(tmp_path, version: str):
    """JAX's own pair traces; beside another libtpu a run goes on, and the remedy is named.

    With a libtpu really installed, which JAX loads in search of a TPU.
    """
    code = f"""
import sys, importlib.metadata as metadata, jax
sys.path[:0] = ["tests/training"]
from clip_jax.training import tracer
import test_telemetry
jax.devices()
known = metadata.version
metadata.version = lambda name: {version!r} or known(name)
made = tracer.Tracer({str(tmp_path)!r}, due=1, steps=1, say=print)
test_telemetry.run_steps(made, range(1, 3))
"""
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pins = [Requirement(text) for text in metadata.requires("jax") or []]
    wanted = next(pin.specifier for pin in pins if pin.name == "libtpu")
    if Version(version or metadata.version("libtpu")) in wanted:
        assert "Traced from step 1 on" in done.stdout
    else:
        assert f"pip install 'libtpu{wanted}'" in done.stderr
