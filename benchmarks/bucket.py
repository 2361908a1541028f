"""Speed of reading tar shards from a bucket, at 20 to 100 ms per request, beside the local disk.

    python benchmarks/bucket.py
    python benchmarks/bucket.py --only=start,index

The bucket is the imitation of Google Cloud Storage in tests/support/bucket_server.py, on this
machine. Its use of the cores is printed, since the readers cannot use them. Three parts:

stream  JPEGs of some 400 x 300 pixels and 22 kB to batches of 224 x 224 pixels and token ids, in
        each data.order; next to webdataset, which reads whole shards, where it is installed
start   opening 1,000 small shards, to the first example
index   indexing shards that have no index

Every measurement has its own process, since clients read the environment at their start, and the
competitors take turns. A stream is measured in its steady state: a shuffle window of images is read
first, and the next window is measured.
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import turns
from input import CONTEXT, SIZE, photograph
from PIL import Image
from tokenizer import Captions
from turns import Step

sys.path.insert(0, str(turns.ROOT / "tests" / "support"))

from bucket_server import Server

SHARD = 256  # photographs in a shard
BATCH = 96  # with 32 interleaved streams, each with a window of 128 images, as by default
SMALL = 1000  # shards of the part start
DISK = 0  # stands for a latency
TICK = os.sysconf("SC_CLK_TCK")


# ---- The data ------------------------------------------------------------------------------------


def write_shards(folder: Path, shards: int, each: int, pictures: list[bytes]) -> float:
    """Writes shards that cycle through the pictures; returns the bytes of an example."""
    folder.mkdir()
    captions, turn, total = Captions(0), itertools.cycle(pictures), 0
    for number in range(shards):
        with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
            for key in range(each):
                files = {"jpg": next(turn), "txt": captions.caption("plain ASCII").encode()}
                for suffix, data in files.items():
                    info = tarfile.TarInfo(f"{number:05}{key:05}.{suffix}")
                    info.size = len(data)
                    total += len(data)
                    tar.addfile(info, io.BytesIO(data))
    return total / (shards * each)


def photographs(count: int, scale: int, quality: int) -> list[bytes]:
    """Makes photographs of some 400 x 300 pixels times `scale`."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        image = Image.open(io.BytesIO(photograph(rng)))
        file = io.BytesIO()
        image.resize([side * scale for side in image.size]).save(file, "JPEG", quality=quality)
        found.append(file.getvalue())
    return found


# ---- What a process does -------------------------------------------------------------------------


def prepare(args: argparse.Namespace, kind: str, **given: str | int) -> tuple[Step, dict]:
    if kind == "opening":
        return lambda: 0.0, opening(**given)
    batches = webdataset(args, **given) if kind == "webdataset" else clip_jax(args, **given)

    def take_step() -> float:
        for _ in range(images_of(args) // BATCH):
            next(batches)
        return 0.0

    return take_step, {}


def images_of(args: argparse.Namespace) -> int:
    """Returns the number of images in a step: a window of them, in whole batches."""
    return -(-args.window // BATCH) * BATCH


def clip_jax(args: argparse.Namespace, path: str, order: str, chunk: int) -> Iterator:
    from clip_jax.configs import default
    from clip_jax.data import mixture, rows, tokenizer
    from clip_jax.data.pipeline import TrainPipeline

    config = default.get_config().data
    config.update(
        crop="resized", order=order, chunk=chunk, shuffle_window=args.window, threads=args.workers
    )
    config.source = default.source(type="tar", path=path)
    source, order_ = mixture.create(config, SIZE, 0, batch_size=BATCH, parts=1)
    tokens = tokenizer.create("openai", CONTEXT)
    spec = rows.Spec(config, "openai", CONTEXT, image_size=SIZE, seed=0, batch_size=BATCH)
    return iter(TrainPipeline(source, order_, tokens, spec))


def webdataset(args: argparse.Namespace, path: str) -> Iterator:
    """Reads whole shards in sequence, through Pillow as in open_clip, in worker processes."""
    import torch
    import webdataset as wds

    from clip_jax.data import crops, tokenizer

    crop, tokens = crops.Crop("resized"), tokenizer.create("openai", CONTEXT)
    rng = np.random.default_rng(0)

    def prepare(sample: dict) -> tuple[np.ndarray, np.ndarray]:
        image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
        part = crops.window(crop, *image.size, rng)
        image = image.crop((part.left, part.top, part.left + part.width, part.top + part.height))
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        return np.asarray(image), tokens.encode(sample["txt"].decode())[0]

    data = wds.WebDataset(path, resampled=True, shardshuffle=False).map(prepare).batched(BATCH)
    return iter(torch.utils.data.DataLoader(data, batch_size=None, num_workers=args.workers))


def opening(path: str) -> dict[str, float]:
    """Measures the seconds until a set is open, and until its first example is read."""
    from clip_jax.configs import default
    from clip_jax.data import mixture

    config = default.get_config().data
    config.source = default.source(type="tar", path=path)
    began = time.perf_counter()
    source, order = mixture.create(config, SIZE, 0, batch_size=BATCH, parts=1)
    opened = time.perf_counter() - began
    assert source[order[0]].image
    return {"opened": opened, "first": time.perf_counter() - began}


# ---- Measuring -----------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(folder: Path, latency: float = 0.0) -> Iterator[Server]:
    """Serves the files of a folder as the bucket "set", for processes started meanwhile."""
    with Server("set", load={"set": folder}) as server, tempfile.TemporaryDirectory() as cache:
        server.latency(latency)
        os.environ.update(server.env, XDG_CACHE_HOME=cache)
        yield server


def start_worker(**given: str | int) -> turns.Worker:
    return turns.Worker(__file__, json.dumps(given), sys.argv[1:], "cpu")


def open_set(path: str = "gs://set") -> dict[str, float]:
    """Runs `opening` in a separate process."""
    worker = start_worker(kind="opening", path=path)
    worker.close()
    return worker.ready


def measure(server: Server, args: argparse.Namespace, given: dict) -> tuple[float, ...]:
    """Measures images/s, CPU ms per image, the server's cores, requests, bytes, connections."""
    server.stats(reset=True)
    worker = start_worker(**given)
    pids = worker.process.pid, server.process.pid
    before, cpu = server.stats(), [cpu_seconds(pid) for pid in pids]
    worker.take_step()
    after, used = server.stats(), [cpu_seconds(pid) - was for pid, was in zip(pids, cpu)]
    worker.close()
    images, seconds = images_of(args), worker.seconds
    counts = ((after[name] - before[name]) / images for name in ("requests", "bytes_out"))
    rates = images / seconds, used[0] * 1000 / images, used[1] / seconds
    return *rates, *counts, after["connections"]


def cpu_seconds(root: int) -> float:
    """Returns the CPU seconds of a process and its descendants, including those that ended."""
    parents, used = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            fields = stat.read_text().rpartition(")")[2].split()
            pid = int(stat.parent.name)
            parents[pid], used[pid] = int(fields[1]), sum(map(int, fields[11:15])) / TICK
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(used.get(pid, 0) for pid in family)


def competitors(args: argparse.Namespace, folder: Path, url: str) -> dict[str, list[dict]]:
    """Returns the settings of each competitor, for the disk and for the bucket."""
    sets = str(folder), "gs://set"
    found: dict[str, list[dict]] = {}
    for chunk in (1, *map(int, args.runs.split(","))):
        order = "shuffled" if chunk == 1 else "windowed"
        told = {"kind": "clip_jax", "order": order, "chunk": chunk}
        name = order if chunk == 1 else f"{order}, chunk {chunk}"
        found[name] = [told | {"path": path} for path in sets]
    if all(map(importlib.util.find_spec, ("webdataset", "torch"))):
        names = f"{{00000..{len(list(folder.glob('*.tar'))) - 1:05}}}.tar"
        sets = f"{folder}/{names}", f"pipe:curl -s {url}/storage/v1/b/set/o/{names}?alt=media"
        found["webdataset"] = [{"kind": "webdataset", "path": path} for path in sets]
    else:
        print("webdataset is left out: it and torch are not both installed.")
    return found


def measure_streams(root: Path, args: argparse.Namespace) -> None:
    folder = root / "photographs"
    shards = 5 * -(-args.window // SHARD)  # no stream reads ahead to the end of the epoch
    own = write_shards(folder, shards, SHARD, photographs(SHARD, 1, 77))
    latencies = [DISK, *map(int, args.latencies.split(","))]
    with serving(folder) as server:
        given = competitors(args, folder, server.url)
        open_set(), open_set(str(folder))  # makes the indices
        rows = list(itertools.product(given, latencies))
        seen: dict[tuple[str, int], list[tuple[float, ...]]] = {row: [] for row in rows}
        for number in range(args.rounds):
            for name, latency in rows[:: -1 if number % 2 else 1]:
                server.latency(latency / 1000)
                told = given[name][latency != DISK]
                seen[name, latency].append(measure(server, args, told))
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    print(f"\n{images_of(args):,} of {shards * SHARD:,} images of {own / 1000:.1f} kB\n")
    columns = "||ms|images/s|slowest - fastest|over the disk|CPU ms an image|cores|the server's"
    print(f"{columns}|requests an image|bytes of its own|connections|\n|---|{'---|' * 10}")
    for name, latency in rows:
        rates = [each[0] for each in seen[name, latency]]
        disk = statistics.median(each[0] for each in seen[name, DISK])
        medians = map(statistics.median, zip(*seen[name, latency]))
        rate, cpu, served, requests, size, connections = medians
        print(
            f"| {name} | {latency or 'disk'} | {rate:,.0f} | {min(rates):,.0f} - {max(rates):,.0f} "
            f"| {rate / disk:.2f} | {cpu:.2f} | {cpu * rate / 1000:.2f} | {served:.2f} "
            f"| {requests:.3f} | {size / own:.2f} | {connections:.0f} |"
        )


def measure_start(root: Path, args: argparse.Namespace) -> None:
    write_shards(root / "small", SMALL, 2, photographs(8, 1, 77))
    print(f"\n{SMALL:,} shards of 2 images, 50 ms a request\n")
    print("| | open s | first example s | requests |\n|---|---|---|---|")
    with serving(root / "small", 0.05) as server:
        for name in ("no index yet", "stored index", "stored index, copied before"):
            server.stats(reset=True)
            found, requests = open_set(), server.stats()["requests"]
            print(f"| {name} | {found['opened']:.2f} | {found['first']:.2f} | {requests} |")


def measure_index(root: Path, args: argparse.Namespace) -> None:
    print("\n50 ms a request\n")
    print("| shards | of | kB an image | s | requests | bytes read, of all | cores of the server |")
    print("|---|---|---|---|---|---|---|")
    for shards, each, scale, quality in ((40, SHARD, 1, 77), (16, 16, 5, 100)):
        folder = root / f"times_{scale}"
        size = write_shards(folder, shards, each, photographs(16, scale, quality))
        total = sum(path.stat().st_size for path in folder.iterdir())
        seen = []
        for _ in range(args.rounds):
            with serving(folder, 0.05) as server:  # a new one, as an index stays in the bucket
                before = cpu_seconds(server.process.pid)
                seconds = open_set()["opened"]
                stats, used = server.stats(), cpu_seconds(server.process.pid) - before
            seen.append((seconds, stats["requests"], stats["bytes_out"] / total, used / seconds))
        seconds, requests, share, cores = map(statistics.median, zip(*seen))
        print(
            f"| {shards} | {each} | {size / 1000:,.0f} | {seconds:.2f} | {requests:.0f} "
            f"| {share:.3f} | {cores:.2f} |"
        )


PARTS = {"stream": measure_streams, "start": measure_start, "index": measure_index}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by commas")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each")
    parser.add_argument("--latencies", default="20,50,100", help="ms, by commas; none is 0")
    parser.add_argument("--runs", default="8,32,128", help="values of data.chunk, comma-separated")
    parser.add_argument(
        "--window", type=int, default=4096, help="data.shuffle_window, and images counted"
    )
    parser.add_argument("--workers", type=int, default=2, help="threads or, webdataset, processes")
    parser.add_argument("--verbose", action="store_true", help="show what the processes print")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        turns.work(lambda: prepare(args, **json.loads(args.worker)))
        return
    print(turns.versions("tensorstore", "gcsfs", "pillow", "simplejpeg", "numpy"))
    with tempfile.TemporaryDirectory() as directory:
        for part in args.only.split(","):
            PARTS[part](Path(directory), args)


if __name__ == "__main__":
    main()
