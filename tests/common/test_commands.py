"""Errors of a machine without memory or space, as sentences; the errors are real ones."""

import errno
import gc
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from clip_jax.common import commands
from clip_jax.errors import ExitCode, Stopped


def caught(action) -> Exception:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("no error")


def test_full_disk():
    def fill():
        with open("/dev/full", "w") as file:
            file.write("a")

    text = commands.explained(caught(fill))
    assert text.startswith("The disk is full")
    assert "resumes at its last complete" in text


def test_full_disk_as_tensorstore_words_it():
    error = ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device")
    assert commands.explained(error).startswith("The disk is full")


def test_device_out_of_memory():
    text = commands.explained(caught(lambda: jnp.zeros(10**14).block_until_ready()))
    assert text.startswith("The device has no memory left")
    assert "--config.accum_steps" in text


def test_host_out_of_memory():
    error = caught(lambda: bytearray(2**62))
    assert "--config.data.prefetch" in commands.explained(error)


def test_file_larger_than_the_limit(tmp_path):
    code = f"""
import resource, signal
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from clip_jax.common import commands
try:
    open({str(tmp_path / "a")!r}, "wb", buffering=0).write(bytes(20_000)) and open(
        {str(tmp_path / "a")!r}, "ab", buffering=0).write(b"a")
except OSError as error:
    print(commands.explained(error))
"""
    ran = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True)
    assert "ulimit -f" in ran.stdout, ran.stderr


def test_hosts_that_lose_touch_may_resume():
    """Two busy hosts waited 30 s for each other's connection."""
    error = jax.errors.JaxRuntimeError(
        "UNKNOWN: Gloo context initialization failed: DEADLINE_EXCEEDED: GetKeyValue() timed out"
    )
    code, text = commands.ending(error)
    assert code == commands.ExitCode.RESUME
    assert text.startswith("The hosts of this run have lost touch")
    assert commands.explained(jax.errors.JaxRuntimeError("INTERNAL: a fault")) == ""


def test_read_only_disk():
    error = OSError(errno.EROFS, os.strerror(errno.EROFS), "/a/b")
    assert commands.explained(error).startswith("The disk is read-only at /a/b")


@pytest.mark.parametrize("error", [ValueError("a fault"), OSError(errno.EIO, "input"), KeyError()])
def test_faults_of_the_program_keep_their_traceback(error):
    assert commands.explained(error) == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_within_a_callback_of_the_garbage_collector(number, capsys):
    def stop(*_):
        raise Stopped("Asked to stop.", ExitCode.RESUME)

    def callback(phase, _):
        if phase == "start":
            gc.callbacks.remove(callback)
            os.kill(os.getpid(), number)

    def run():
        with commands.plain_errors():
            gc.callbacks.append(callback)
            gc.collect()
            time.sleep(20)
        pytest.fail("It was lost.")

    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    hook = sys.unraisablehook
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(SystemExit) as ended:
            run()
    finally:
        signal.signal(signal.SIGTERM, previous)
    code, text = {
        signal.SIGINT: (ExitCode.INTERRUPTED, "Interrupted."),
        signal.SIGTERM: (ExitCode.RESUME, "Asked to stop."),
    }[number]
    assert ended.value.code == code
    assert capsys.readouterr().err == f"\n{text}\n"
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert sys.unraisablehook is hook


@pytest.mark.parametrize(
    ("error", "cleans_up"),
    [
        ("KeyboardInterrupt", False),
        ("Stopped('Asked to stop.', ExitCode.RESUME)", False),
        ("Stopped('Saved.', ExitCode.RESUME, everywhere=True)", True),
    ],
)
def test_python_does_not_clean_up_beneath_threads(error, cleans_up):
    program = f"""
import atexit
from clip_jax.common import commands
from clip_jax.errors import ExitCode, Stopped
atexit.register(print, "Cleaned up.")
print("Begun.")
with commands.plain_errors(threads_may_hang=True):
    raise {error}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    interrupted = error == "KeyboardInterrupt"
    assert done.returncode == (ExitCode.INTERRUPTED if interrupted else ExitCode.RESUME)
    assert done.stdout == "Begun.\n" + "Cleaned up.\n" * cleans_up
