"""Reading tar shards from a bucket, at 20 to 100 ms a request, next to the local disk.

    python benchmarks/bucket.py
    python benchmarks/bucket.py --only=start,index

The bucket is the Google Cloud Storage of tests/bucket_server.py, on this machine: what it takes of
the cores is printed, since the readers go without it. Three parts:

stream  JPEGs of some 400 x 300 pixels and 23 kB to batches of 224 x 224 pixels and token ids, in
        each data.order; next to webdataset, which reads whole shards, where it is installed
start   opening 1,000 small shards, to the first example
index   finding out what stands where in shards that have no index

Every measurement has a process of its own, since clients read the environment at their start, and
the competitors take turns. A stream is measured when it flows, after as many images as are then
counted: those of a window, so that each window is begun once meanwhile.
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
from typing import NamedTuple

import numpy as np
import turns
from input import CONTEXT, SIZE, photograph
from PIL import Image
from tokenizer import Captions
from turns import Step

sys.path.insert(0, str(turns.ROOT / "tests"))

from bucket_server import Server

SHARD = 256  # photographs in a shard
DISK = 0  # in place of a latency
TICK = os.sysconf("SC_CLK_TCK")


# ---- The data ------------------------------------------------------------------------------------


def write_shards(folder: Path, shards: int, each: int, pictures: list[bytes]) -> float:
    """Writes shards in which the pictures come in turn; returns the bytes of an example."""
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


def photographs(count: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    return [jpeg(Image.open(io.BytesIO(photograph(rng))), 77) for _ in range(count)]


def large_pictures(count: int) -> list[bytes]:
    """Noise, of 1 to 2 MB."""
    rng = np.random.default_rng(0)
    widths = rng.integers(1000, 1900, count)
    noise = (rng.integers(0, 256, (1000, width, 3), np.uint8) for width in widths)
    return [jpeg(Image.fromarray(each), 90) for each in noise]


def jpeg(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


# ---- What a process does -------------------------------------------------------------------------


def prepare(args: argparse.Namespace, kind: str, **given: str | int) -> tuple[Step, dict]:
    if kind == "opening":
        return lambda: 0.0, opening(args, **given)
    batches = webdataset(args, **given) if kind == "webdataset" else clip_jax(args, **given)

    def take_step() -> float:
        for _ in itertools.islice(batches, images_of(args) // args.batch_size):
            pass
        return 0.0

    return take_step, {}


def images_of(args: argparse.Namespace) -> int:
    """Images of a step: as many as a window has, in whole batches."""
    return -(-args.window // args.batch_size) * args.batch_size


def clip_jax(args: argparse.Namespace, path: str, order: str, run: int) -> Iterator:
    from clip_jax.data import mixture, tokenizer
    from clip_jax.data.pipeline import TrainPipeline
    from configs import default

    config = default.get_config().data
    config.update(crop="resized", order=order, run=run, window=args.window, threads=args.workers)
    config.source = default.source(type="tar", path=path)
    shape = {"image_size": SIZE, "seed": 0, "batch_size": args.batch_size}
    source, order_ = mixture.create(config, parts=1, **shape)
    tokens = tokenizer.create("openai", CONTEXT)
    return iter(TrainPipeline(source, order_, tokens, config, part=0, parts=1, **shape))


def webdataset(args: argparse.Namespace, path: str) -> Iterator:
    """Whole shards one after the other, through Pillow as in open_clip, in worker processes."""
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

    urls = [path.replace("NAME", f"{number:05}.tar") for number in range(shards_of(args))]
    data = wds.WebDataset(urls, resampled=True, shardshuffle=False)
    data = data.map(prepare).batched(args.batch_size)
    return iter(torch.utils.data.DataLoader(data, batch_size=None, num_workers=args.workers))


def opening(args: argparse.Namespace, path: str) -> dict[str, float]:
    """Seconds until a set is open, and until its first example is there."""
    from clip_jax.data import mixture
    from configs import default

    config = default.get_config().data
    config.source = default.source(type="tar", path=path)
    began = time.perf_counter()
    source, order = mixture.create(config, SIZE, 0, batch_size=args.batch_size, parts=1)
    opened = time.perf_counter() - began
    assert source[order[0]].image
    return {"opened": opened, "first": time.perf_counter() - began}


# ---- Measuring -----------------------------------------------------------------------------------


class Seen(NamedTuple):
    """Of a stream: per image what is not a rate, but for the connections."""

    rate: float  # images/s
    cpu: float  # ms
    server: float  # cores
    requests: float
    size: float  # bytes
    connections: float


def start_worker(args: argparse.Namespace, **given: str | int) -> turns.Worker:
    return turns.Worker(__file__, json.dumps(given), args.given, "cpu")


def measure(server: Server, args: argparse.Namespace, **given: str | int) -> Seen:
    server.stats(reset=True)
    worker = start_worker(args, **given)
    pids = worker.process.pid, server.process.pid
    before, cpu = server.stats(), [cpu_seconds(pid) for pid in pids]
    worker.take_step()
    stats, own = server.stats(), [cpu_seconds(pid) for pid in pids]
    worker.close()
    images = images_of(args)
    return Seen(
        rate=images / worker.seconds,
        cpu=(own[0] - cpu[0]) * 1000 / images,
        server=(own[1] - cpu[1]) / worker.seconds,
        requests=(stats["requests"] - before["requests"]) / images,
        size=(stats["bytes_out"] - before["bytes_out"]) / images,
        connections=stats["connections"],
    )


def cpu_seconds(root: int) -> float:
    """What a process and its descendants have used, those that have ended included."""
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


@contextlib.contextmanager
def serving(folder: Path, latency: float = 0.0) -> Iterator[Server]:
    """A bucket "set" with the files of a folder, to which all processes begun meanwhile are led."""
    with Server("set", load={"set": folder}) as server, tempfile.TemporaryDirectory() as cache:
        server.latency(latency)
        os.environ.update(server.env, XDG_CACHE_HOME=cache)
        yield server


def shards_of(args: argparse.Namespace) -> int:
    """Shards of photographs: so many that no stream has read ahead to the end of the epoch."""
    return 5 * -(-args.window // SHARD)


def measure_streams(root: Path, args: argparse.Namespace) -> None:
    folder = root / "photographs"
    own = write_shards(folder, shards_of(args), SHARD, photographs(SHARD))
    orders = {"shuffled": ("shuffled", 1)}
    orders |= {f"windowed, run {run}": ("windowed", run) for run in map(int, args.runs)}
    names = [*orders]
    if importlib.util.find_spec("webdataset") and importlib.util.find_spec("torch"):
        names.append("webdataset")
    else:
        print("webdataset is left out: it and torch are not both installed.")
    with serving(folder) as server:

        def given(name: str, on_disk: bool) -> dict[str, str | int]:
            if name != "webdataset":
                order, run = orders[name]
                path = str(folder) if on_disk else "gs://set"
                return {"kind": "clip_jax", "path": path, "order": order, "run": run}
            url = f"pipe:curl -s {server.url}/storage/v1/b/set/o/NAME?alt=media"
            return {"kind": name, "path": f"{folder}/NAME" if on_disk else url}

        for path in (str(folder), "gs://set"):  # makes their indices
            start_worker(args, kind="opening", path=path).close()
        rows = [(name, latency) for name in names for latency in (DISK, *map(int, args.latencies))]
        seen: dict[tuple[str, int], list[Seen]] = {row: [] for row in rows}
        for number in range(args.rounds):
            for name, latency in rows[:: -1 if number % 2 else 1]:
                server.latency(latency / 1000)
                seen[name, latency].append(measure(server, args, **given(name, latency == DISK)))
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    print(f"\n{images_of(args):,} of {shards_of(args) * SHARD:,} images of {own / 1000:.1f} kB\n")
    print("| | ms | images/s | slowest - fastest | of the disk's | CPU ms an image", end=" ")
    print("| cores of the server | requests an image | bytes of its own | connections |")
    print("|---|" + "---|" * 9)
    for name, latency in rows:
        rates = [each.rate for each in seen[name, latency]]
        found, disk = (
            Seen(*map(statistics.median, zip(*seen[name, place]))) for place in (latency, DISK)
        )
        print(
            f"| {name} | {latency or 'disk'} | {found.rate:,.0f} "
            f"| {min(rates):,.0f} - {max(rates):,.0f} | {found.rate / disk.rate:.2f} "
            f"| {found.cpu:.2f} | {found.server:.2f} | {found.requests:.3f} "
            f"| {found.size / own:.2f} | {found.connections:.0f} |"
        )


def measure_start(root: Path, args: argparse.Namespace) -> None:
    write_shards(root / "small", args.shards, 2, photographs(8))
    print(f"\n{args.shards:,} shards of 2 images, 50 ms a request\n")
    print("| | open s | first example s | requests |\n|---|---|---|---|")
    with serving(root / "small", 0.05) as server:
        for name in ("no index yet", "stored index", "stored index, copied before"):
            server.stats(reset=True)
            worker = start_worker(args, kind="opening", path="gs://set")
            worker.close()
            opened, first = worker.ready["opened"], worker.ready["first"]
            print(f"| {name} | {opened:.2f} | {first:.2f} | {server.stats()['requests']} |")


def measure_index(root: Path, args: argparse.Namespace) -> None:
    sets = {"small": (40, SHARD, photographs(SHARD)), "large": (16, 16, large_pictures(8))}
    print("\n50 ms a request\n")
    print("| shards | images in each | kB an image | s | requests | bytes read, of all", end=" ")
    print("| cores of the server |\n|---|---|---|---|---|---|---|")
    for name, (shards, each, pictures) in sets.items():
        folder = root / f"index_{name}"
        size = write_shards(folder, shards, each, pictures)
        total = sum(path.stat().st_size for path in folder.iterdir())
        seen = []
        for _ in range(args.rounds):
            with serving(folder, 0.05) as server:  # a new one, as an index stays in the bucket
                before = cpu_seconds(server.process.pid)
                worker = start_worker(args, kind="opening", path="gs://set")
                worker.close()
                stats, used = server.stats(), cpu_seconds(server.process.pid) - before
            seconds = worker.ready["opened"]
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
    parser.add_argument("--latencies", default="20,50,100", help="ms of a request, by commas")
    parser.add_argument("--runs", default="8,32,128", help="each data.run, by commas")
    parser.add_argument("--window", type=int, default=4096, help="data.window, and images counted")
    # 32 lanes, so that each has 128 examples of the window: as many as 256 have of the default.
    parser.add_argument("--batch_size", type=int, default=96)
    parser.add_argument("--shards", type=int, default=1000, help="of the part start")
    parser.add_argument("--workers", type=int, default=2, help="threads or, webdataset, processes")
    parser.add_argument("--verbose", action="store_true", help="show what the processes print")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        turns.work(lambda: prepare(args, **json.loads(args.worker)))
        return
    args.given = sys.argv[1:]
    args.runs, args.latencies = args.runs.split(","), args.latencies.split(",")
    print(turns.versions("tensorstore", "gcsfs", "pillow", "simplejpeg", "numpy"))
    with tempfile.TemporaryDirectory() as directory:
        for part in args.only.split(","):
            PARTS[part](Path(directory), args)


if __name__ == "__main__":
    main()
