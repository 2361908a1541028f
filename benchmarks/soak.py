"""Growth of a long run: memory, threads, descriptors and objects over 20,000 steps.

    python benchmarks/soak.py
    python benchmarks/soak.py --steps=5000 --processes=0

Trains a tiny model on the embedded digits with everything that a run does between its steps: logs,
TensorBoard, evaluations, checkpoints; first with the loader's threads in the trainer, then with two
loader processes. Prints a row per sample, then the slope of each figure per 1,000 steps, by least
squares over the samples after the warm-up, and whether it is within the limits. Exits with 1 if one
is not.

PSS counts a page that n processes share as an n-th of it. "in use" and "free" are what malloc has
given out, and what it holds for later: memory that grows while "in use" does not is fragmented.
"""

import argparse
import collections
import ctypes
import gc
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
SETTINGS = {
    "model.size.image_size": 16,
    "model.size.image_layers": (1,),
    "model.size.image_width": 32,
    "model.size.image_heads": 2,
    "model.size.text_layers": 1,
    "model.size.text_width": 32,
    "model.size.text_heads": 2,
    "model.size.embed_dim": 16,
    "batch_size": 16,
    "log.every": "10 steps",
    "eval.every": "100 steps",
    "eval.batch_size": 128,
    "eval.retrieval.max_examples": 100,
    "checkpoint.every": "100 steps",
}
# Figures of a sample, their titles, and the growth per 1,000 steps that is allowed.
FIGURES = {
    "rss": ("RSS MiB", 0.5),
    "children": ("loaders' PSS MiB", 0.5),
    "in_use": ("in use MiB", 0.1),
    "free": ("free MiB", 0.5),
    "arenas": ("arenas", 0.1),
    "threads": ("threads", 0.1),
    "files": ("descriptors", 0.1),
    "arrays": ("jax arrays", 0.1),
    "objects": ("Python objects", 20.0),
}


class MallInfo(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
        "".split()
    ]


def sample() -> dict[str, float]:
    """Returns the figures of this process and of its children."""
    import jax

    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = MallInfo
    gc.collect()
    heap = libc.mallinfo2()
    return {
        "rss": memory(os.getpid(), "Rss"),
        "children": sum(memory(pid, "Pss") for pid in children()),
        "in_use": (heap.uordblks + heap.hblkhd) / 2**20,
        "free": heap.fordblks / 2**20,
        "arenas": arenas(libc),
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
        "arrays": len(jax.live_arrays()),
        "objects": len(gc.get_objects()),
    }


def memory(pid: int, kind: str) -> float:
    """Returns the MiB of a process; 0 if it has ended."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) / 2**10


def children() -> list[int]:
    found = []
    for task in pathlib.Path("/proc/self/task").iterdir():
        try:
            found += map(int, (task / "children").read_text().split())
        except OSError:  # the thread has ended
            continue
    return found


def arenas(libc: ctypes.CDLL) -> int:
    """Returns the number of malloc's arenas."""
    libc.fopen.restype = ctypes.c_void_p
    with tempfile.NamedTemporaryFile() as file:
        stream = ctypes.c_void_p(libc.fopen(file.name.encode(), b"w"))
        libc.malloc_info(0, stream)
        libc.fclose(stream)
        return file.read().count(b"<heap nr=")


def types() -> collections.Counter[str]:
    """Counts the objects that the garbage collector knows by their type."""
    return collections.Counter(
        f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.get_objects()
    )


def worker(workdir: str, steps: int, processes: int, every: int) -> None:
    """Trains, and prints a sample as JSON every so many steps."""
    sys.path.insert(0, str(ROOT))
    from clip_jax.common import metrics
    from clip_jax.configs import vit_b32
    from clip_jax.training import train

    config = vit_b32.get_config("smoke")
    settings = SETTINGS | {"duration": f"{steps} steps", "data.processes": processes}
    config.update_from_flattened_dict(settings)
    print_ = print
    first: list[collections.Counter[str]] = []
    write = metrics.MetricWriter.write

    def sampling(self: Any, step: int, row: Any) -> None:
        write(self, step, row)
        if step % every == 0 and "train/loss" in row:
            print_(json.dumps({"step": step, **sample()}), file=sys.stderr, flush=True)
            if step >= steps // 4 and not first:
                first.append(types())
            if step > steps - every:
                grown = (types() - first[0]).most_common(8)
                print_(json.dumps({"grown": grown}), file=sys.stderr, flush=True)

    metrics.MetricWriter.write = sampling
    train.train(config, workdir)


def slope(rows: Sequence[dict[str, float]], name: str) -> float:
    """Returns the growth per 1,000 steps, by least squares."""
    import numpy as np

    steps = np.array([row["step"] for row in rows]) / 1000
    return float(np.polyfit(steps, [row[name] for row in rows], 1)[0])


def soak(steps: int, processes: int, every: int) -> bool:
    """Runs one worker and prints its table; returns whether it is within the limits."""
    print(f"\n{steps:,} steps, data.processes={processes}\n", flush=True)
    titles = ["step", "ETA s", *(title for title, _ in FIGURES.values())]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}", flush=True)
    rows, grown, began = [], [], time.monotonic()
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, __file__, f"--steps={steps}", f"--every={every}"]
        command += [f"--processes={processes}", "--worker", workdir]
        run = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        last: collections.deque[str] = collections.deque(maxlen=20)
        for line in run.stderr or ():
            if not line.startswith("{"):
                last.append(line)
                continue
            row = json.loads(line)
            if "grown" in row:
                grown = row["grown"]
                continue
            rows.append(row)
            left = (time.monotonic() - began) * (steps / row["step"] - 1)
            cells = [f"{row['step']:,}", f"{left:,.0f}", *(f"{row[k]:,.1f}" for k in FIGURES)]
            print(f"| {' | '.join(cells).replace('.0 |', ' |')} |", flush=True)
        if run.wait():
            sys.exit(f"The run ended with {run.returncode}:\n{''.join(last)}")
    seconds = time.monotonic() - began
    settled = [row for row in rows if row["step"] >= steps // 4]
    slopes = {name: slope(settled, name) for name in FIGURES}
    cells = ["per 1,000 steps", "", *(f"{each:+.2f}" for each in slopes.values())]
    print(f"| {' | '.join(cells)} |")
    cells = ["allowed", "", *(f"{allowed:g}" for _, allowed in FIGURES.values())]
    print(f"| {' | '.join(cells)} |\n")
    print(f"{steps / seconds:,.0f} steps/s, with all that is between them.")
    print("More objects than after the warm-up:", ", ".join(f"{n:,} x {name}" for name, n in grown))
    too_fast = [title for name, (title, allowed) in FIGURES.items() if slopes[name] > allowed]
    print("Grows: " + ", ".join(too_fast) if too_fast else "No growth.", flush=True)
    return not too_fast


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=0, help="steps per sample; 0: 40 samples")
    parser.add_argument("--processes", type=int, nargs="+", default=[0, 2], help="data.processes")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    every = args.every or max(100, args.steps // 40)
    if args.worker:
        worker(args.worker, args.steps, args.processes[0], every)
        return
    within = [soak(args.steps, processes, every) for processes in args.processes]
    sys.exit(0 if all(within) else 1)


if __name__ == "__main__":
    main()
