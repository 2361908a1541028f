"""Training-step speed with packed captions: clip_jax packed and unpacked, and open_clip.

    python benchmarks/packing.py
    python benchmarks/packing.py --batch=128 --length=128 --rows=0.16

Needs open_clip_torch. All train ViT-B/32 on the same images and captions, in float32 (on a GPU in
bfloat16), and take turns. The number of ids of a caption, including start and end token, is 2 plus
a log-normal variable, at most 77. Its mean is 17, its median 15, and one in a hundred has 53 or
more.

Prints medians, and the speed relative to unpacked; also the fraction of random batches that need
more rows than the first round has, and so take about twice as long in the text tower.
"""

import argparse
import math
import statistics

import numpy as np
import step
import turns

COMPETITORS = ("clip_jax", "clip_jax packed", "open_clip")
SIGMA, CONTEXT = 0.6, 77
# Deviation and mean of the logarithm, for 17 ids in the mean, apart from those cut off at 77.
MU = math.log(15) - SIGMA**2 / 2


def draw_lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draws the numbers of ids of captions."""
    return to_ids(rng.normal(MU, SIGMA, count))


def typical_lengths(count: int) -> np.ndarray:
    """Returns shuffled quantiles of the distribution, which a small batch represents exactly."""
    normal = statistics.NormalDist(MU, SIGMA)
    quantiles = np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)])
    return np.random.default_rng(0).permutation(to_ids(quantiles))


def to_ids(logarithms: np.ndarray) -> np.ndarray:
    return np.clip(np.round(2 + np.exp(logarithms)), 3, CONTEXT).astype(int)


def make_batch(size, count: int) -> step.Batch:
    """Makes a batch as `step.make_batch` does, with captions of realistic length."""
    rng = np.random.default_rng(0)
    images, tokens = step.make_batch(size, count)
    for row, length in zip(tokens, typical_lengths(count)):
        row[:] = 0
        row[:length] = rng.integers(1, size.vocab_size - 2, length)
        row[0], row[length - 1] = size.vocab_size - 2, size.vocab_size - 1
    return images, tokens


def rows_taken(lengths: np.ndarray, row_length: int) -> int:
    """Returns the number of rows that first fit fills, longest captions first."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = (number for number, room in enumerate(free) if room >= length)
        if (row := next(fitting, None)) is None:
            free.append(row_length - length)
        else:
            free[row] -= length
    return len(free)


def prepare(competitor: str, args: argparse.Namespace) -> tuple[turns.Step, dict]:
    from clip_jax import models
    from clip_jax.models.packing import Packing

    size = models.get_size("ViT-B/32")
    batch = make_batch(size, args.batch)
    if competitor == "open_clip":
        take_step, _ = step.open_clip_step(size, batch, args.device)
    else:
        packing = Packing(args.length, args.rows) if competitor == "clip_jax packed" else None
        take_step, _ = step.clip_jax_step(size, batch, args.scan, packing, args.device)
    return take_step, {}


def report(workers: list[turns.Worker], args: argparse.Namespace):
    base = workers[0].seconds
    print("| | speed | s/step | fastest - slowest | images/s | peak GiB | start, s | loss |")
    print("|---|---|---|---|---|---|---|---|")
    for worker in workers:
        print(
            f"| {worker.competitor} | {base / worker.seconds:.2f} | {worker.seconds:.3g} "
            f"| {worker.spread} | {args.batch / worker.seconds:,.1f} "
            f"| {worker.steps[-1]['peak']:.1f} | {worker.ready['start']:.0f} | {worker.losses} |"
        )


def report_fill(args: argparse.Namespace):
    """Prints the rows of the timed batch, and of 1,000 others."""
    rng, count = np.random.default_rng(0), math.ceil(args.rows * args.batch)
    timed = typical_lengths(args.batch)
    others = (draw_lengths(rng, args.batch) for _ in range(1000))
    more = np.mean([rows_taken(lengths, args.length) > count for lengths in others])
    print(
        f"{args.batch} captions of {timed.mean():.1f} ids fill {rows_taken(timed, args.length)} of "
        f"{count} rows of {args.length}: {timed.sum() / (count * args.length):.0%} of the tokens "
        f"computed are captions' (unpacked: {timed.mean() / CONTEXT:.0%}). Of random batches "
        f"{more:.1%} need a second round.\n"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=32, help="pairs per step")
    parser.add_argument("--device", choices=turns.PLATFORMS, default="cpu")
    parser.add_argument("--length", type=int, default=80, help="tokens in a packed row")
    parser.add_argument("--rows", type=float, default=0.28, help="packed rows per caption")
    parser.add_argument("--scan", action="store_true", help="layers in a scan, not unrolled")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each competitor")
    parser.add_argument("--only", default=",".join(COMPETITORS), help="comma-separated")
    parser.add_argument("--verbose", action="store_true", help="show what the competitors print")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return turns.work(
            lambda: prepare(args.worker, args), lambda: step.peak(args.worker, args.device)
        )

    chosen = args.only.split(",")
    if unknown := set(chosen) - set(COMPETITORS):
        parser.error(f"no {', '.join(unknown)}; choose of: {', '.join(COMPETITORS)}")
    workers = turns.take_turns(__file__, chosen, args.rounds, args.device)
    packages = turns.versions("jax", "flax", "optax", "torch", "open_clip_torch")
    layers = "scanned" if args.scan else "unrolled"
    dtype = "bfloat16" if args.device == "gpu" else "float32"
    print(f"ViT-B/32, batch {args.batch}, {dtype}, layers {layers}, {args.rounds} rounds")
    print(f"{packages}\n")
    report_fill(args)
    report(workers, args)
    return None


if __name__ == "__main__":
    main()
