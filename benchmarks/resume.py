"""Time and memory of resuming far into a large set, up to the first batch.

    python benchmarks/resume.py

Makes 1,200 tar shards of 10,000 samples as hard links to one shard, so that 12 million index
entries take 150 MB of disk. Then a fresh process opens them through the stored index at position 10
million and takes the first batch of decoded images and token ids.
"""

import argparse
import io
import json
import os
import pathlib
import resource
import subprocess
import sys
import tarfile
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
SAMPLES = 10_000


def write_shard(path: pathlib.Path) -> None:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(SAMPLES):
            noise = rng.integers(0, 256, (8, 10, 3), np.uint8)
            file = io.BytesIO()
            Image.fromarray(noise).resize((400, 300), Image.Resampling.BICUBIC).save(file, "JPEG")
            contents = ((".jpg", file.getvalue()), (".txt", f"picture {number}".encode()))
            for suffix, data in contents:
                info = tarfile.TarInfo(f"{number:09}{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_index(folder: str) -> float:
    """Writes the index of all shards after scanning one; returns the seconds of the scan."""
    from etils import epath

    from clip_jax.data.sources import shard_index, tar_index
    from clip_jax.storage import locations

    paths = locations.expand(folder, ".tar")
    began = time.monotonic()
    found = tar_index.scan(epath.Path(paths[0]))
    seconds = time.monotonic() - began
    kind = shard_index.Kind("tar", tar_index.ROW, lambda path: found)
    shard_index.load(paths, kind, workers=1)
    return seconds


def resume(path: str, order: str, start: int, batch_size: int) -> dict[str, float]:
    """Opens the set and takes the first batch; times include the imports."""
    began = time.monotonic()
    from clip_jax.configs import default
    from clip_jax.data import mixture, pipeline, rows, tokenizer

    imported = time.monotonic()
    config = default.get_config().data
    config.source = default.source(type="tar", path=path)
    config.order = order
    source, order_ = mixture.create(config, 224, 0, batch_size=batch_size, parts=1)
    opened = time.monotonic()
    spec = rows.Spec(config, "openai", 77, image_size=224, seed=0, batch_size=batch_size)
    tokens = tokenizer.create("openai", 77)
    batches = pipeline.TrainPipeline(source, order_, tokens, spec, start=start)
    batch = next(iter(batches))
    assert batch["image"].shape == (batch_size, 224, 224, 3)
    return {
        "entries": len(source),
        "imports": imported - began,
        "open": opened - imported,
        "batch": time.monotonic() - opened,
        "total": time.monotonic() - began,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shards", type=int, default=1200, help="shards of 10,000 samples")
    parser.add_argument("--start", type=int, default=10_000_000, help="position to resume at")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.worker:
        print(json.dumps(resume(*args.worker, args.start, args.batch_size)))
        return
    with tempfile.TemporaryDirectory() as folder:
        first = pathlib.Path(folder, "00000.tar")
        write_shard(first)
        for number in range(1, args.shards):
            os.link(first, first.with_name(f"{number:05}.tar"))
        seconds = write_index(folder)
        print(f"Indexing one shard took {seconds:.2f} s, {SAMPLES / seconds:,.0f} samples/s.\n")
        print("| order | entries | imports s | open s | first batch s | in all s | peak GiB |")
        print("|---|---|---|---|---|---|---|")
        for order in ("shuffled", "windowed"):
            # The script anew, so that imports and memory are those of a fresh process.
            command = [sys.executable, __file__, f"--start={args.start}"]
            command += [f"--batch_size={args.batch_size}", "--worker", folder, order]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            seen = json.loads(output.splitlines()[-1])
            times = " | ".join(f"{seen[key]:.2f}" for key in ("imports", "open", "batch", "total"))
            print(f"| {order} | {seen['entries']:,} | {times} | {seen['peak']:.2f} |")


if __name__ == "__main__":
    main()
