"""Embedding speed on the CPU: clip_jax next to open_clip, taking turns.

    python benchmarks/inference.py
    python benchmarks/inference.py --images=1000 --captions=1000

Needs open_clip_torch. Embeds by ViT-B/32 with random weights in float32, in batches of --batch.
Each round, every competitor embeds one part of the images and of the captions; with the defaults,
1,000 images and 10,000 captions in 4 rounds. The last batch of a part is smaller, and clip_jax pads
it, so many small parts would measure the padding.

open_clip runs eagerly in inference mode and gets normalised pixels and token ids, so only its model
is measured. clip_jax is called as users call it, with uint8 pixels and with strings. Captions are
words of one token each. With start and end token they have a mean of 17 tokens, a median of 15, and
one in a hundred has 53 or more.

Rates are sums over all rounds. The run fails if XLA compiles a program after the first round.
"""

import argparse
import sys
import time
from collections.abc import Callable

import numpy as np
import packing
import turns

COMPETITORS = ("open_clip", "clip_jax")
SIDE = 224
WORDS = ("a", "the", "red", "small", "old", "dog", "cat", "house", "tree", "on", "under", "near")

Encode = Callable[[], None]


def make_images(count: int) -> np.ndarray:
    """Makes images, uint8 [n, SIDE, SIDE, 3]."""
    return np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def make_captions(count: int) -> list[str]:
    """Makes captions with the given numbers of tokens, including start and end token."""
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, length - 2)) for length in packing.typical_lengths(count)]


# ---- Competitors: each makes what embeds all images, and what embeds all captions --------------


def clip_jax_encoders(images: np.ndarray, captions: list[str], batch: int) -> tuple[Encode, Encode]:
    import jax

    from clip_jax import api, models
    from clip_jax.data import tokenizer

    net = models.create("ViT-B/32")
    pixels, ids = images[:1], np.zeros((1, net.size.context_length), np.int32)
    variables = jax.jit(lambda key: net.init(key, pixels, ids))(jax.random.key(0))
    tokens = tokenizer.create("openai", net.size.context_length)
    model = api.Model(net, variables, tokens, batch_size=batch)
    return lambda: _check(model.encode_image(images)), lambda: _check(model.encode_text(captions))


def open_clip_encoders(
    images: np.ndarray, captions: list[str], batch: int
) -> tuple[Encode, Encode]:
    import open_clip
    import torch

    from clip_jax import models
    from clip_jax.data import tokenizer

    model = open_clip.create_model("ViT-B-32-quickgelu").eval()
    size = models.get_size("ViT-B/32")
    normalised = ((images / 255 - size.image_mean) / size.image_std).astype(np.float32)
    pixels = torch.from_numpy(normalised).permute(0, 3, 1, 2).contiguous()
    ids = torch.from_numpy(tokenizer.tokenize(captions)).long()

    def embed(encode, inputs) -> None:
        with torch.inference_mode():
            parts = [encode(part, normalize=True) for part in inputs.split(batch)]
            _check(torch.cat(parts).numpy())

    return lambda: embed(model.encode_image, pixels), lambda: embed(model.encode_text, ids)


def _check(embeds: np.ndarray) -> None:
    np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, atol=1e-4)


def count_compilations() -> list[str]:
    """Returns a list to which every program is added that JAX compiles from now on."""
    import jax

    compiled: list[str] = []

    def listen(event: str, duration: float, **details) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return compiled


# ---- The run -----------------------------------------------------------------------------------


def work(competitor: str, images: int, captions: int, batch: int) -> None:
    """Runs a competitor; a step of `turns.work` embeds one part of both."""
    spent: list[dict] = []

    def prepare() -> tuple[turns.Step, dict]:
        make = clip_jax_encoders if competitor == "clip_jax" else open_clip_encoders
        encode_image, encode_text = make(make_images(images), make_captions(captions), batch)
        compiled = count_compilations() if competitor == "clip_jax" else []

        def take_step() -> float:
            before, start = len(compiled), time.perf_counter()
            encode_image()
            middle = time.perf_counter()
            encode_text()
            spent.append({"image": middle - start, "text": time.perf_counter() - middle})
            if len(spent) > 1 and len(compiled) > before:
                sys.exit(f"{len(compiled) - before} programs were compiled after the first round")
            return spent[-1]["image"]

        return take_step, {}

    turns.work(prepare)


def report(workers: list[turns.Worker], images: int, captions: int) -> None:
    """Prints a line per competitor; the loss of `turns` is the seconds for the images."""
    base = workers[0]
    print("| | images/s | over open_clip | captions/s | over open_clip | peak GiB | start, s |")
    print("|---|---|---|---|---|---|---|")
    for worker in workers:
        image, text = seconds(worker)
        base_image, base_text = seconds(base)
        rounds = len(worker.steps)
        print(
            f"| {worker.competitor} | {rounds * images / image:.1f} | {base_image / image:.2f} "
            f"| {rounds * captions / text:.1f} | {base_text / text:.2f} "
            f"| {worker.steps[-1]['peak']:.1f} | {worker.ready['start']:.0f} |"
        )


def seconds(worker: turns.Worker) -> tuple[float, float]:
    """Returns the seconds for all images and for all captions."""
    image = sum(step["loss"] for step in worker.steps)
    return image, sum(step["seconds"] for step in worker.steps) - image


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--captions", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=4, help="rounds that they are spread over")
    parser.add_argument("--batch", type=int, default=32, help="images or captions at a time")
    parser.add_argument("--verbose", action="store_true", help="show what the competitors print")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    images, captions = args.images // args.rounds, args.captions // args.rounds
    if args.worker:
        return work(args.worker, images, captions, args.batch)
    workers = turns.take_turns(__file__, list(COMPETITORS), args.rounds)
    print(turns.versions("jax", "flax", "torch", "open_clip_torch"), end="\n\n")
    return report(workers, images, captions)


if __name__ == "__main__":
    main()
