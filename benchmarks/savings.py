"""Measures what dropped patches, a frozen tower, small images or short captions save of a step.

    python benchmarks/savings.py
    python benchmarks/savings.py --model=vit_b16 --batch=4 --side=224 --rounds=3

All steps are compiled first and take turns within one process, each on a state of its own. Beside
the rates stand the operations that the compiler counts.
"""

import argparse
import statistics
import sys

import turns

# Settings on top of the plain step, by name. "{half}" is half the side of the images.
SAVINGS = {
    "plain": {},
    "patch_dropout=0.5": {"model.patch_dropout": 0.5},
    "image tower frozen": {"optim.factors": "^image/=0"},
    "text tower frozen": {"optim.factors": "^text/=0"},
    "half the side": {"model.size.image_size": "{half}"},
    "half the tokens": {"model.size.context_length": 39},
}


def make_step(args: argparse.Namespace, settings: dict) -> tuple[turns.Timed, float]:
    """Compiles the training step that main.py would run; returns a timed call, and its FLOPs."""
    from clip_jax.common import config_file
    from clip_jax.training import program

    config = config_file.load(args.model)
    config.batch_size = args.batch
    config.loss.method = "ring"
    config.model.size.image_size = args.side
    config.model.packing.length = 0  # captions here are noise, all of full length
    halved = {name: args.side // 2 if x == "{half}" else x for name, x in settings.items()}
    config.update_from_flattened_dict(halved)
    seconds, step = turns.timed_step(program.build(config, examples=1_000_000))
    return seconds, step.cost_analysis()["flops"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="vit_b32", help="a config")
    parser.add_argument("--batch", type=int, default=16, help="pairs per step")
    parser.add_argument("--side", type=int, default=256, help="of the images, pixels")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each")
    args = parser.parse_args()
    sys.path.insert(0, str(turns.ROOT))
    steps = {name: make_step(args, settings) for name, settings in SAVINGS.items()}
    rounds = []
    for number in range(args.rounds + 1):
        order = list(steps) if number % 2 else list(reversed(steps))
        rounds.append({name: steps[name][0]() for name in order})
    rounds = rounds[1:]  # the first warms up
    print(f"{args.model} at {args.side} pixels, batch {args.batch}, {args.rounds} rounds")
    print("| | a step, s | pairs/s | the same, by CPU time | operations |")
    print("|---|---|---|---|---|")
    for name, (_, flops) in steps.items():
        step = statistics.median(times[name][0] for times in rounds)
        wall, cpu = (
            statistics.median(times["plain"][kind] / times[name][kind] for times in rounds)
            for kind in (0, 1)
        )
        fraction = flops / steps["plain"][1]
        print(f"| {name} | {step:.3f} | x {wall:.2f} | x {cpu:.2f} | x {fraction:.2f} |")


if __name__ == "__main__":
    main()
