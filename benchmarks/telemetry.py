"""The cost of telemetry: the training step with and without it in turns, and a row of the log.

    python benchmarks/telemetry.py
    python benchmarks/telemetry.py --model=vit_b32 --batch=32 --rounds=7

Both programs are compiled first and take turns within one process, each on a state of its own. The
step without leaves out the norms by tower, alignment and uniformity; the rest of the telemetry is
computed once a row, whose seconds are measured by themselves.
"""

import argparse
import statistics
import sys
import tempfile
import time

import turns


def without_telemetry(built) -> turns.Timed:
    """Compiles the step with nothing but the norms of the whole."""
    import optax

    from clip_jax.training import step

    kept = step._norms, step._geometry
    step._norms = lambda name, tree: {name: optax.tree.norm(tree)}
    step._geometry = lambda outputs, params: {}
    try:
        return turns.timed_step(built)[0]
    finally:
        step._norms, step._geometry = kept


def row_seconds(built, rows: int = 200) -> float:
    """Measures the median of a row: the numbers of the host, metrics.jsonl and TensorBoard."""
    from clip_jax.common import metrics
    from clip_jax.training import telemetry

    config = built.config
    measured = telemetry.Telemetry(
        built.net.size, config.batch_size, config.data.captions, built.mesh
    )
    others = {f"train/metric_{i}": 1.0 for i in range(30)}
    times = []
    with tempfile.TemporaryDirectory() as folder:
        writer = metrics.MetricWriter(folder, tensorboard=True, start_step=0)
        for step in range(rows):
            began = time.perf_counter()
            writer.write(step, {**others, **measured.measure(100.0)})
            times.append(time.perf_counter() - began)
        writer.close()
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="vit_b32:smoke", help="a config")
    parser.add_argument("--batch", type=int, help="pairs per step; default: the config's")
    parser.add_argument("--rounds", type=int, default=100, help="timed steps of each")
    args = parser.parse_args()
    sys.path.insert(0, str(turns.ROOT))
    from clip_jax.common import config_file
    from clip_jax.training import program

    config = config_file.load(args.model)
    config.batch_size = args.batch or config.batch_size
    config.loss.method = "ring"
    built = program.build(config, examples=1_000_000)
    bare, full = without_telemetry(built), turns.timed_step(built)[0]
    rounds = []
    for number in range(args.rounds + 1):
        if number % 2:
            rounds.append((bare(), full()))
        else:
            rounds.append(tuple(reversed((full(), bare()))))
    row = row_seconds(built)
    every = int(config.log.every.split()[0])
    print(f"{args.model}, batch {config.batch_size}, {args.rounds} rounds; a row {row:.4f} s")
    print("| | a step without, s | in the step | with a row every N steps | N |")
    print("|---|---|---|---|---|")
    for kind, name in enumerate(("wall time", "CPU time")):
        pairs = [(one[kind], other[kind]) for one, other in rounds[1:]]  # the first warms up
        step = statistics.median(without for without, _ in pairs)
        more = statistics.median(telemetry - without for without, telemetry in pairs)
        both = (more + row / every) / step
        print(f"| {name} | {step:.4f} | {more / step:+.2%} | {both:+.2%} | {every} |")


if __name__ == "__main__":
    main()
