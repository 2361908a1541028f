"""Time and memory of converting weights: ViT-L/14 by default, 428 M random parameters.

Every conversion runs in a separate process. Memory is the peak of its resident set, including the
pages of the source that it has mapped.

    python benchmarks/convert.py
    python benchmarks/convert.py --model=RN50x64
"""

import argparse
import math
import multiprocessing
import os
import pathlib
import resource
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

TRIPS = (
    ("clip_jax", "huggingface"),
    ("huggingface", "clip_jax"),
    ("clip_jax", "open_clip"),
    ("open_clip", "clip_jax"),
    ("clip_jax", "openai"),
    ("openai", "clip_jax"),
)


def write_random(model: str, path: str) -> int:
    """Writes a model with random weights; returns its number of values."""
    import numpy as np

    from clip_jax import models, weights
    from clip_jax.weights.convert import tokens
    from clip_jax.weights.model import Tensors, Weights, variable_shapes

    size = models.get_size(model)
    shapes = variable_shapes(size)
    rng = np.random.default_rng(0)
    tensors = Tensors(shapes, lambda name: rng.random(shapes[name], np.float32))
    origin = {"source": "random", "format": "clip_jax"}
    made = Weights(size, tensors, tokens.OPENAI, origin)
    weights.save(made, path)
    return sum(map(math.prod, shapes.values()))


def run(source: str, target: str, to: str, model: str, results) -> None:
    """Converts; sends back seconds and peak bytes, start of Python and JAX included."""
    began = time.monotonic()
    from clip_jax import weights

    weights.save(weights.open(source, model=model), target, to)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    results.put((time.monotonic() - began, peak))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ViT-L/14")
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        places = {name: root / name for name in ("clip_jax", "huggingface", "open_clip")}
        places["openai"] = root / "openai.pt"
        with spawn.Pool(1) as pool:
            values = pool.apply(write_random, (args.model, str(places["clip_jax"])))
        print(f"{args.model}: {values / 1e6:.0f} M values, {values * 4 / 2**30:.2f} GiB")
        for source, to in TRIPS:
            if "huggingface" in (source, to) and args.model.startswith("RN"):
                continue
            target = places[to] if to != "clip_jax" else root / f"from_{source}"
            results = spawn.Queue()
            given = (str(places[source]), str(target), to, args.model, results)
            process = spawn.Process(target=run, args=given)
            process.start()
            seconds, peak = results.get()
            process.join()
            print(
                f"{source:>12} -> {to:<12} {seconds:6.1f} s   peak {peak / 2**30:5.2f} GiB, "
                f"{peak / (values * 4):.2f} times the weights"
            )


if __name__ == "__main__":
    main()
