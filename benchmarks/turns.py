"""Competitors in separate processes that take turns, one step each per round.

They all see the same machine within seconds of each other; only ratios within a run are meaningful.
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
# No competitor may reserve most of a GPU's memory before the others have theirs.
PLATFORMS = {
    "cpu": {"JAX_PLATFORMS": "cpu"},
    "gpu": {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
}

Step = Callable[[], float]  # does the timed work once, returns its loss
Timed = Callable[[], tuple[float, float]]  # takes a step: seconds, and those of the CPUs


def random_batch(shapes: dict) -> dict:
    """Makes the batch that `Program.batch` describes, of noise, on its devices."""
    import jax
    import numpy as np

    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.integers(0, 256, shapes["image"].shape, np.uint8),
        "tokens": rng.integers(1, 49_408, shapes["tokens"].shape, np.int32),
    }
    return {name: jax.device_put(x, shapes[name].sharding) for name, x in arrays.items()}


def timed_step(built) -> tuple[Timed, object]:
    """Compiles the step of a `program.Program`; returns a timed call, and the compiled program."""
    import jax

    data = random_batch(built.batch)
    state, step = built.init(), built.lower().compile()

    def seconds() -> tuple[float, float]:
        nonlocal state
        began = time.perf_counter(), time.process_time()
        state, _ = jax.block_until_ready(step(state, data))
        return time.perf_counter() - began[0], time.process_time() - began[1]

    return seconds, step


def host_peak() -> float:
    """Returns the peak memory of this process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def work(prepare: Callable[[], tuple[Step, dict]], peak: Callable[[], float] = host_peak) -> None:
    """Runs a competitor: prints a line of JSON when ready, and one for every line it reads.

    Args:
      prepare: function that returns the step and facts about it.
      peak: function that returns the peak memory so far, in GiB.
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
    """The process of a competitor.

    Attributes:
      ready: "start" (seconds until after the first step), "loss" of that step, "before" (peak GiB
        before it), and the facts that `prepare` returned.
      steps: "seconds", "loss" and "peak" (GiB) of each step.
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
        with contextlib.suppress(BrokenPipeError):  # _read reports it
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
        """The median time of a step."""
        return statistics.median(step["seconds"] for step in self.steps)

    @property
    def spread(self) -> str:
        """The fastest and the slowest step."""
        seconds = [step["seconds"] for step in self.steps]
        return f"{min(seconds):.3g} - {max(seconds):.3g}"

    @property
    def losses(self) -> str:
        """The losses of the first and the last step."""
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
        first = number % len(workers)
        for worker in workers[first:] + workers[:first]:
            worker.take_step()
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    for worker in workers:
        worker.close()
    return workers


def versions(*packages: str) -> str:
    """Describes the machine and the packages in a line."""
    found = [f"{name} {metadata.version(name)}" for name in packages]
    return f"{os.cpu_count()} CPUs ({platform.machine()}), Python {platform.python_version()}, " + (
        ", ".join(found)
    )
