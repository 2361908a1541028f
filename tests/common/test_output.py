"""Readers of the output that go away: commands end as by SIGPIPE, a training run goes on."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import tiny_run
import xla_flags

from clip_jax.common import output
from clip_jax.errors import ExitCode

ROOT = pathlib.Path(__file__).parents[2]
SMOKE = "--config=configs/vit_b32.py:smoke"


def train(workdir: pathlib.Path, changes: dict | None = None, **streams) -> subprocess.Popen:
    given = {**tiny_run.SETTINGS, **(changes or {})}
    command = [sys.executable, "main.py", SMOKE, f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in given.items()]
    # The devices of this process, so that the losses are those of its runs; its programs too.
    tiny_run.finished()
    env = {
        **xla_flags.environment(8),
        "JAX_COMPILATION_CACHE_DIR": str(tiny_run.folder() / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return subprocess.Popen(command, cwd=ROOT, env=env, **streams)


def events(workdir: pathlib.Path) -> list[str]:
    (start,) = (workdir / "starts").iterdir()
    return [event["text"] for event in json.loads(start.read_text())["events"]]


def assert_nothing_is_missing(workdir: pathlib.Path) -> None:
    assert tiny_run.learned(workdir) == tiny_run.learned(tiny_run.finished())
    assert (workdir / "report.html").exists()


def test_a_run_goes_on_without_the_reader_of_its_log(tmp_path):
    """The case of main.py | head -1: it is told once, on standard error and in the record."""
    run = train(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout.readline()
    run.stdout.close()
    said = run.stderr.read().decode()
    assert run.wait(200) == ExitCode.DONE
    assert said.count("Standard output cannot be written (Broken pipe). Training goes on") == 1
    assert "Traceback" not in said
    (event,) = events(tmp_path)
    assert event == (
        "Standard output cannot be written (Broken pipe). Training goes on, and metrics.jsonl has "
        "the numbers."
    )
    assert_nothing_is_missing(tmp_path)


@pytest.mark.slow
def test_a_log_on_a_full_disk(tmp_path):
    with open("/dev/full", "wb") as full:
        run = train(tmp_path, stdout=full, stderr=full)
        assert run.wait(200) == ExitCode.DONE
    assert "(No space left on device). Training goes on" in events(tmp_path)[0]
    assert_nothing_is_missing(tmp_path)


@pytest.mark.slow
def test_a_signal_after_the_reader_of_both_outputs_is_gone(tmp_path):
    """SIGTERM still saves and ends with 42: main.py 2>&1 | tee log, whose tee is killed."""
    run = train(
        tmp_path, {"duration": "400 steps"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert run.stdout.readline()
    run.stdout.close()
    rows = tmp_path / "metrics.jsonl"
    while run.poll() is None and (not rows.exists() or len(rows.read_bytes().splitlines()) < 3):
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    assert run.wait(100) == ExitCode.RESUME
    (start,) = (tmp_path / "starts").iterdir()
    assert "SIGTERM: saved at step" in json.loads(start.read_text())["end"]["reason"]


# Arguments of Python, and whether standard error goes the same way.
COMMANDS = {
    "a list": (["-m", "clip_jax", "--help"], False),
    "help": (["-m", "clip_jax", "status", "--help"], True),
    "help of train": (["main.py", "--help"], False),
    "a result": (["-m", "clip_jax", "status", "."], False),
    "an error": (["-m", "clip_jax", "status", "/nowhere"], True),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_other_commands_end_as_by_sigpipe(name: str):
    arguments, both = COMMANDS[name]
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=writer,
        stderr=writer if both else subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": ""},  # argparse takes a failure for success
        check=False,
    )
    os.close(writer)
    assert ended.returncode == ExitCode.UNREAD == 128 + signal.SIGPIPE
    assert not ended.stderr


def test_a_broken_pipe_that_is_not_the_output_is_an_error():
    with pytest.raises(BrokenPipeError), output.ends_unread():
        raise BrokenPipeError


def test_closed_from_the_start():
    """The case of main.py >&-."""
    code = "import sys; from clip_jax.common import output\nwith output.outlived():\n"
    code += " print(1, flush=True); sys.exit(3 + sys.stdout.isatty())"
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        ended = subprocess.run(["bash", "-c", f'"{sys.executable}" -c "$0" {closed}', code])
        assert ended.returncode == 3
