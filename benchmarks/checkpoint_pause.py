"""Seconds for which a checkpoint holds up training, and those until it is on the disk.

    python benchmarks/checkpoint_pause.py
    python benchmarks/checkpoint_pause.py --model=ViT-L/14 --repeat=3 --workdir=/mnt/disk

Saves the training state of a model, parameters and two float32 moments, and times the parts:

    checksums  of all arrays, on the device
    copy       orbax's part that blocks: the arrays leave the device
    pause      all that the loop waits for; its fraction of 5 minutes is what training loses
    finish     until the checkpoint is complete, which a run that is asked to end waits for too
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
EVERY = 300.0  # seconds between two saves
PARTS = ("checksums", "copy", "pause", "finish")


def make_state(name: str):
    """Returns the initial training state of a model."""
    from clip_jax.configs import default
    from clip_jax.training import program

    config = default.get_config()
    config.model.name = name
    return program.build(config, examples=1_000_000).init(None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B/32")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--workdir", help="folder on the disk to measure; a temporary one is made")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import jax

    from clip_jax import checkpoint, checksums

    state = jax.block_until_ready(make_state(options.model))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    print(f"{options.model}: {size / 2**30:.2f} GiB on {jax.devices()[0].device_kind}", flush=True)
    items = {"model": state.variables, "optimizer": {"opt_state": state.opt_state}}
    checksums.inspect(items)  # compiled before anything is timed
    rounds: dict[str, list[float]] = {part: [] for part in PARTS}
    with (
        tempfile.TemporaryDirectory(dir=options.workdir) as workdir,
        checkpoint.Checkpoints(workdir) as store,
    ):
        for step in range(options.repeat + 1):  # the first is not counted
            began = time.monotonic()
            checksums.inspect(items)
            inspected = time.monotonic()
            store.save(state, step, {}, {})
            saved = time.monotonic()
            store.finish()
            finished = time.monotonic()
            found = inspected - began, saved - inspected - (inspected - began), saved - inspected
            print("  ".join(f"{part} {s:.2f} s" for part, s in zip(PARTS, found)), end="  ")
            print(f"finish {finished - inspected:.2f} s", flush=True)
            if step:
                for part, seconds in zip(PARTS, (*found, finished - inspected)):
                    rounds[part].append(seconds)
    print("\n| part | median s | least s | most s | of 5 minutes |\n|---|---|---|---|---|")
    for part, seconds in rounds.items():
        middle = statistics.median(seconds)
        print(
            f"| {part} | {middle:.2f} | {min(seconds):.2f} | {max(seconds):.2f} | "
            f"{middle / EVERY:.2%} |"
        )


if __name__ == "__main__":
    main()
