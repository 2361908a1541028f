"""Time and memory of exact ranks between many images and ten times as many captions.

    python benchmarks/retrieval.py
    python benchmarks/retrieval.py --full      # 100,000 images and 1,000,000 captions

First compares clip_jax with plain NumPy, which holds the whole matrix of similarities, at a size
where that is possible. Embeddings are small integers, so that products are exact and both must find
the same ranks, ties included. Then measures clip_jax alone at the large size; without --full, the
time of the full size is extrapolated from the time per tile. Embeddings are float16 in
memory-mapped files. Their pages count in "peak", but not in "own", the memory that the process has
allocated.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import turns

CAPTIONS = 10  # per image
FULL = 100_000  # images
COPIED = 0.15  # fraction of a caption's numbers copied from its image, for ranks of every size
CHUNK = 10_000  # rows made at a time


def write(folder: Path, images: int, width: int) -> None:
    """Writes images.npy and texts.npy: integers from -3 to 3, float16."""
    rng, new = np.random.default_rng(0), np.lib.format.open_memmap
    shapes = {"images": (images, width), "texts": (images * CAPTIONS, width)}
    files = {
        name: new(folder / f"{name}.npy", "w+", np.float16, shape) for name, shape in shapes.items()
    }
    for start in range(0, len(files["images"]), CHUNK // CAPTIONS):
        rows = slice(start, start + CHUNK // CAPTIONS)
        files["images"][rows] = rng.integers(-3, 4, files["images"][rows].shape)
    for start in range(0, len(files["texts"]), CHUNK):
        rows = slice(start, start + CHUNK)
        own = files["images"][np.arange(len(files["texts"]))[rows] // CAPTIONS]
        copied = rng.random(own.shape, np.float32) < COPIED
        files["texts"][rows] = np.where(copied, own, rng.integers(-3, 4, own.shape))


def ranked_by_clip_jax(images, texts, pairs) -> tuple[list[np.ndarray], dict]:
    """Computes the ranks; returns them, the seconds per tile and the memory still held."""
    sys.path.insert(0, str(turns.ROOT))
    from clip_jax import sharding
    from clip_jax.evaluate.measures import ranks

    ticks, own = [time.perf_counter()], [allocated()]

    def progress(done: int, total: int) -> None:
        ticks.append(time.perf_counter())
        own.append(allocated())
        if done == total or done % max(total // 10, 1) == 0:
            print(f"tile {done:,} of {total:,}", file=sys.stderr)

    start, mesh = time.perf_counter(), sharding.make_mesh()
    found = ranks.match_ranks(images, texts, pairs, mesh, progress=progress)
    facts = {
        "seconds": time.perf_counter() - start,
        "tiles": len(ticks) - 1,
        "tile": statistics.median(np.diff(ticks)),
        "scores": ranks.TILE[0] * ranks.TILE[1],
        "own": max(own) - own[0],
    }
    return list(found), facts


def ranked_by_numpy(images, texts, pairs) -> tuple[list[np.ndarray], dict]:
    before, start = allocated(), time.perf_counter()
    scores = np.asarray(images, np.float32) @ np.asarray(texts, np.float32).T
    right = np.zeros(scores.shape, bool)
    right[tuple(pairs.T)] = True
    found = []
    for axis in (1, 0):
        best = np.where(right, scores, -np.inf).max(axis, keepdims=True)
        found.append(np.sum(~right & ~(scores < best), axis))
    return found, {"seconds": time.perf_counter() - start, "own": allocated() - before}


COMPETITORS = {"clip_jax": ranked_by_clip_jax, "NumPy, one matrix": ranked_by_numpy}


def work(competitor: str, folder: Path) -> None:
    """Ranks in a separate process; prints a line of JSON, and writes the ranks to a file."""
    if competitor == "clip_jax":
        import jax

        jax.devices()  # so that its start is not measured
    images, texts = (np.load(folder / f"{name}.npy", "r") for name in ("images", "texts"))
    pairs = np.stack([np.arange(len(texts)) // CAPTIONS, np.arange(len(texts))], axis=1)
    before = resident()
    found, facts = COMPETITORS[competitor](images, texts, pairs)
    np.savez(folder / f"{competitor}.npz", image_to_text=found[0], text_to_image=found[1])
    print(json.dumps({**facts, "peak": resident() - before}))


def resident() -> float:
    """Returns the peak memory of this process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def allocated() -> float:
    """Returns the memory of this process in GiB, without mapped files."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 2**20


def measure(competitor: str, folder: str) -> dict:
    # The script anew, so that the memory is that of a fresh process.
    command = [sys.executable, __file__, f"--worker={competitor}", f"--folder={folder}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(competitors: list[str], images: int, width: int) -> list[dict]:
    """Prints a row for each competitor; exits if they disagree."""
    rows, results = [], []
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), images, width)
        for name in competitors:
            seen = measure(name, folder)
            with np.load(Path(folder) / f"{name}.npz") as found:
                results.append([found["image_to_text"], found["text_to_image"]])
            print(
                f"| {name} | {images:,} x {images * CAPTIONS:,} | {seen['seconds']:.1f} "
                f"| {1e9 * seen['seconds'] / (CAPTIONS * images**2):.1f} | {seen['peak']:.2f} "
                f"| {seen['own']:.2f} |",
                flush=True,
            )
            rows.append(seen)
    for other in results[1:]:
        for one, another in zip(results[0], other):
            if not np.array_equal(one, another):
                sys.exit(f"The ranks differ in {np.sum(one != another)} of {len(one)} queries.")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=20_000, help="images at the large size")
    parser.add_argument("--compared", type=int, default=4000, help="images of the small size")
    parser.add_argument("--width", type=int, default=512, help="width of the embeddings")
    parser.add_argument("--full", action="store_true", help=f"{FULL:,} images")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.folder)
        return
    images = FULL if args.full else args.images
    print(turns.versions("jax", "numpy"))
    print("\n| | images x captions | s | ns per similarity | peak GiB over start | own GiB |")
    print("|---|---|---|---|---|---|")
    run(list(COMPETITORS), args.compared, args.width)
    (seen,) = run(["clip_jax"], images, args.width)
    print(f"\nThe ranks are equal. {seen['tiles']:,} tiles, the median of {seen['tile']:.4f} s.")
    if not args.full:
        hours = seen["tile"] * CAPTIONS * FULL**2 / seen["scores"] / 3600
        print(f"{FULL:,} x {CAPTIONS * FULL:,} would take {hours:.2f} hours on one device.")


if __name__ == "__main__":
    main()
