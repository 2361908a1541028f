"""Competitors in processes of their own, each computing only when it is its turn.

So all see the same machine within seconds of each other; only ratios within a run mean anything.
"""

import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Freed memory stays with the process: page faults are a large part of a CPU step otherwise.
ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
# Nobody may take most of a GPU's memory before the others have theirs.
PLATFORMS = {
    "cpu": {"JAX_PLATFORMS": "cpu"},
    "gpu": {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
}

Step = Callable[[], float]  # does the timed work once, returns its loss


def host_peak() -> float:
    """GiB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def work(prepare: Callable[[], tuple[Step, dict]], peak: Callable[[], float] = host_peak) -> None:
    """A competitor's process: one line of JSON when ready, and one for every line it reads.

    Args:
      prepare: makes the step, and what else there is to say of it.
      peak: GiB held at most until now.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print goes to stderr
    sys.path.insert(0, str(ROOT))
    start = time.perf_counter()
    take_step, facts = prepare()
    before = peak()
    first_loss = take_step()
    ready = {**facts, "start": time.perf_counter() - start, "loss": first_loss, "before": before}
    print(json.dumps(ready), file=answers)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = take_step()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "loss": loss, "peak": peak()}), file=answers)


class Worker:
    """A competitor's process, seen from outside.

    Attributes:
      ready: what it said of itself: "start" (seconds until after the first step), "loss" of that,
        "before" (peak GiB before it), and what `prepare` returned.
      steps: of each turn "seconds", "loss" and "peak" (GiB).
    """

    def __init__(self, script: str, competitor: str, arguments: list[str], device: str):
        self.competitor = competitor
        self.process = subprocess.Popen(
            [sys.executable, script, *arguments, f"--worker={competitor}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if "--verbose" in arguments else subprocess.DEVNULL,
            text=True,
            env={**os.environ, **ENVIRONMENT, **PLATFORMS[device]},
        )
        self.ready = self._read()
        self.steps: list[dict] = []

    def take_step(self) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # _read says what it means
            print("step", file=self.process.stdin, flush=True)
        self.steps.append(self._read())

    def _read(self) -> dict:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.competitor} stopped: run again with --verbose to see why.")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    @property
    def seconds(self) -> float:
        """Median of a turn."""
        return statistics.median(step["seconds"] for step in self.steps)

    @property
    def spread(self) -> str:
        """Fastest and slowest turn."""
        seconds = [step["seconds"] for step in self.steps]
        return f"{min(seconds):.3g} - {max(seconds):.3g}"

    @property
    def losses(self) -> str:
        """Of the first and the last turn."""
        return f"{self.ready['loss']:.3f} -> {self.steps[-1]['loss']:.3f}"


def take_turns(
    script: str, competitors: list[str], rounds: int, device: str = "cpu"
) -> list[Worker]:
    """Starts a script's workers with this process's own arguments; each takes a step a round."""
    workers = []
    for name in competitors:  # one after the other: compilation would disturb
        workers.append(Worker(script, name, sys.argv[1:], device))
        print(f"{name} is ready", file=sys.stderr)
    for number in range(rounds):
        turn = number % len(workers)
        for worker in workers[turn:] + workers[:turn]:
            worker.take_step()
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    for worker in workers:
        worker.close()
    return workers


def versions(*packages: str) -> str:
    """The machine and the packages, in a line."""
    found = [f"{name} {metadata.version(name)}" for name in packages]
    return f"{os.cpu_count()} CPUs ({platform.machine()}), Python {platform.python_version()}, " + (
        ", ".join(found)
    )
