"""The cost and the savings of exact accumulation, for ViT-B/32 in float32 on one CPU.

    python benchmarks/accumulation.py

Compares the time per example of a step of 4 micro-batches of 32 with that of a plain step of 32,
and the memory of 32 micro-batches of 128 with that of plain steps, as the compiler reports it.
"""

import argparse
import functools
import sys

import turns

COMPETITORS = {"plain": (32, 1), "accumulated": (128, 4)}  # batch, accum_steps
PROGRAMS = ((128, 1), (4096, 32), (256, 1))


def build(batch: int, accum_steps: int):
    """Builds the training step that main.py would run, before any array exists."""
    from clip_jax.configs import vit_b32
    from clip_jax.training import program

    config = vit_b32.get_config()
    config.update_from_flattened_dict(
        {
            "batch_size": batch,
            "accum_steps": accum_steps,
            "loss.method": "ring",
            "model.scan_layers": True,
            "model.packing.length": 0,  # captions here are noise, all of full length
        }
    )
    return program.build(config, examples=1_000_000)


def prepare(competitor: str) -> tuple[turns.Step, dict]:
    import jax

    batch, accum_steps = COMPETITORS[competitor]
    built = build(batch, accum_steps)
    data = turns.random_batch(built.batch)
    state, step = built.init(), built.lower().compile()

    def take_step() -> float:
        nonlocal state
        state, metrics = step(state, data)
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    return take_step, {}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each")
    parser.add_argument("--verbose", action="store_true", help="show what the competitors print")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return turns.work(functools.partial(prepare, args.worker))
    sys.path.insert(0, str(turns.ROOT))
    print("| batch | micro-batches of | temporary GiB |\n|---|---|---|")
    for batch, accum_steps in PROGRAMS:
        memory = build(batch, accum_steps).lower().compile().memory_analysis()
        temporary = memory.temp_size_in_bytes / 2**30
        print(f"| {batch:,} | {batch // accum_steps} | {temporary:.1f} |", flush=True)
    workers = turns.take_turns(__file__, list(COMPETITORS), args.rounds)
    print("\n| | s a pair | fastest - slowest step | of plain | peak GiB |\n|---|---|---|---|---|")
    base = workers[0].seconds / COMPETITORS["plain"][0]
    for worker in workers:
        each = worker.seconds / COMPETITORS[worker.competitor][0]
        peak = worker.steps[-1]["peak"]
        print(
            f"| {worker.competitor} | {each:.3f} | {worker.spread} | {each / base:.2f} "
            f"| {peak:.1f} |"
        )
    return None


if __name__ == "__main__":
    main()
