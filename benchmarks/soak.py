"""Growth of a long run: memory, threads, descriptors and objects over 20,000 steps.

    python benchmarks/soak.py
    python benchmarks/soak.py --steps=5000 --processes=0 --save_every=100
    python benchmarks/soak.py --tensorstore           # what TensorStore alone leaks, by the call

Trains a tiny model on the embedded digits with everything that a run does between its steps: logs,
TensorBoard, evaluations, checkpoints; first with the loader's threads in the trainer, then with two
loader processes. Prints a row per sample, then the slope of each figure per 1,000 steps, by least
squares over the samples after the warm-up, with its standard error. A figure grows if its slope is
more than two standard errors above what is allowed; the exit code is then 1.

What is allowed has a part for each checkpoint. TensorStore 0.1.86 never frees the Python objects
that it makes of its specs, and orbax asks it for that of each array at every save.

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
import time
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
# Figures of a sample, their titles, and the growth that is allowed: per 1,000 steps, and per save.
FIGURES = {
    "rss": ("RSS MiB", 0.3, 0.15),
    "children": ("loaders' PSS MiB", 0.3, 0.0),
    "in_use": ("in use MiB", 0.1, 0.06),
    "free": ("free MiB", 0.3, 0.15),
    "arenas": ("arenas", 0.1, 0.0),
    "threads": ("threads", 0.1, 0.0),
    "files": ("descriptors", 0.1, 0.0),
    "arrays": ("jax arrays", 0.1, 0.0),
    "objects": ("Python objects", 10.0, 50.0),
}


class MallInfo(ctypes.Structure):
    """The result of glibc's mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks")]
    _fields_ += [(name, ctypes.c_size_t) for name in ("hblkhd", "usmblks", "fsmblks")]
    _fields_ += [(name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")]


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


def worker(workdir: str, steps: int, processes: int, save_every: int, every: int) -> None:
    """Trains, and prints a sample as JSON every so many steps."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
    import tiny_run

    from clip_jax.common import metrics
    from clip_jax.training import train

    config = tiny_run.config(
        {
            "duration": f"{steps} steps",
            "log.every": "10 steps",
            "eval.every": "100 steps",
            "data.processes": processes,
            "checkpoint.every": f"{save_every} steps",
            "checkpoint.best_metric": "",  # which saves at steps of its own
        }
    )
    first: list[collections.Counter[str]] = []
    write = metrics.MetricWriter.write

    def sampling(self: Any, step: int, row: Any) -> None:
        write(self, step, row)
        if step % every == 0 and "train/loss" in row:
            print(json.dumps({"step": step, **sample()}), file=sys.stderr, flush=True)
            if step >= steps // 4 and not first:
                first.append(types())
            if step > steps - every:
                grown = (types() - first[0]).most_common(8)
                print(json.dumps({"grown": grown}), file=sys.stderr, flush=True)

    metrics.MetricWriter.write = sampling
    train.train(config, workdir)


def slope(rows: Sequence[dict[str, float]], name: str) -> tuple[float, float]:
    """Returns the growth per 1,000 steps, by least squares, and its standard error."""
    import numpy as np

    steps = np.array([row["step"] for row in rows]) / 1000
    values = np.array([row[name] for row in rows])
    steps -= steps.mean()
    found = steps @ values / (steps @ steps)
    rest = values - values.mean() - found * steps
    return float(found), float(np.sqrt(rest @ rest / max(len(rows) - 2, 1) / (steps @ steps)))


def soak(steps: int, processes: int, save_every: int, every: int) -> bool:
    """Runs one worker and prints its table; returns whether it is within the limits."""
    print(f"\n{steps:,} steps, a save every {save_every}, data.processes={processes}\n", flush=True)
    titles = ["step", "ETA s", *(title for title, *_ in FIGURES.values())]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}", flush=True)
    rows, grown, began = [], [], time.monotonic()
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, __file__, f"--steps={steps}", f"--every={every}"]
        command += [f"--save_every={save_every}", f"--processes={processes}", "--worker", workdir]
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
    allowed = {
        name: a_step + a_save * 1000 / save_every for name, (_, a_step, a_save) in FIGURES.items()
    }
    cells = ["per 1,000", "", *(f"{each:+.2f} ± {error:.2f}" for each, error in slopes.values())]
    print(f"| {' | '.join(cells)} |")
    print(f"| {' | '.join(['allowed', '', *(f'{each:.2g}' for each in allowed.values())])} |\n")
    print(f"{steps / seconds:,.0f} steps/s, with all that is between them.")
    print("More objects than after the warm-up:", ", ".join(f"{n:,} x {name}" for name, n in grown))
    too_fast = [
        FIGURES[name][0]
        for name, (each, error) in slopes.items()
        if each - 2 * error > allowed[name]
    ]
    print("Grows: " + ", ".join(too_fast) if too_fast else "No growth.", flush=True)
    return not too_fast


def tensorstore() -> None:
    """Prints what calls of TensorStore that orbax makes at every save leave behind."""
    import tensorstore as ts

    with tempfile.TemporaryDirectory() as folder:
        spec = {"driver": "file", "path": folder + "/"}
        ts.KvStore.open(spec).result()["name"] = b"value"
        for name, call in {
            "KvStore.Spec.to_json": ts.KvStore.Spec(spec).to_json,
            "experimental_collect_matching_metrics": lambda: (
                ts.experimental_collect_matching_metrics("/tensorstore/kvstore/")
            ),
        }.items():
            call()
            gc.collect()
            before = sys.getallocatedblocks()
            for _ in range(1000):
                call()
            gc.collect()
            left = (sys.getallocatedblocks() - before) / 1000
            print(f"{name}: {left:.1f} blocks of memory are left by each call")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=0, help="steps per sample; 0: 40 samples")
    parser.add_argument("--processes", type=int, nargs="+", default=[0, 2], help="data.processes")
    parser.add_argument("--save_every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--tensorstore", action="store_true", help="only try TensorStore")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    every = args.every or max(100, args.steps // 40)
    if args.worker:
        worker(args.worker, args.steps, args.processes[0], args.save_every, every)
        return
    if args.tensorstore:
        tensorstore()
        return
    within = [soak(args.steps, each, args.save_every, every) for each in args.processes]
    sys.exit(0 if all(within) else 1)


if __name__ == "__main__":
    main()
