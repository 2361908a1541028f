"""Several processes on 127.0.0.1 that stand for the hosts of a pod."""

import pathlib
import socket
import subprocess
import sys

import xla_flags

ROOT = pathlib.Path(__file__).parents[2]
TIMEOUT = 200  # seconds


def launch(arguments: list[str], devices: int, quick: str = xla_flags.QUICK) -> subprocess.Popen:
    """Starts Python with this many virtual devices."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=xla_flags.environment(devices, quick),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def endings(processes: list[subprocess.Popen]) -> list[subprocess.CompletedProcess]:
    """Returns exit codes and all that they printed, once all have ended."""
    try:
        printed = [process.communicate(timeout=TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *each)
        for process, each in zip(processes, printed)
    ]


def outputs(processes: list[subprocess.Popen]) -> list[str]:
    """Returns what they printed, once all have ended well."""
    ended = endings(processes)
    for each in ended:
        assert each.returncode == 0, each.stderr
    return [each.stdout for each in ended]


def flags(count: int) -> list[list[str]]:
    """Returns the flags of each of so many hosts."""
    shared = [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={count}"]
    return [[*shared, f"--process={process}"] for process in range(count)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
