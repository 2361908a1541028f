"""The fraction of a zero-shot evaluation's time that the encoders take.

    python benchmarks/zeroshot.py
    python benchmarks/zeroshot.py --model=small      # a fast model, so that the rest counts more

Writes 10,000 JPEGs of 256 x 256 pixels in 100 classes in CLIP_benchmark's layout, and evaluates a
model with random weights on them by `python -m clip_jax evaluate --tasks=zeroshot`, with the
paper's 18 templates for CIFAR-100. "encoders" is the time to read, decode and embed the images, and
to embed the 1,800 prompts and the two smaller variants, including compilation. "rest" is the time
to find the set, hash the model, and write embeddings, scores, intervals and pages. Imports and
loading the model are listed apart.
"""

import argparse
import dataclasses
import io
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import turns
from PIL import Image

CLASSES, TEMPLATES, SIDE = 100, 18, 256
SIZES = {
    "ViT-B/32": {},
    "small": {
        "image_layers": (4,),
        "image_width": 192,
        "image_heads": 3,
        "text_layers": 4,
        "text_width": 192,
        "text_heads": 3,
    },
}


def write_set(root: Path, count: int) -> None:
    """Writes the test split, in shards of 1,000."""
    (root / "test").mkdir(parents=True)
    names = [f"class number {i}" for i in range(CLASSES)]
    (root / "classnames.txt").write_text("\n".join(names) + "\n")
    templates = [f"a photo of a {{c}}, in style {i}." for i in range(TEMPLATES)]
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")
    rng = np.random.default_rng(0)
    for shard in range(-(-count // 1000)):
        with tarfile.open(root / "test" / f"{shard}.tar", "w") as tar:
            for i in range(1000 * shard, min(1000 * shard + 1000, count)):
                coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
                file = io.BytesIO()
                coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
                for suffix, data in (("jpg", file.getvalue()), ("cls", str(i % CLASSES).encode())):
                    member = tarfile.TarInfo(f"s{i:07}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def write_model(folder: Path, name: str) -> None:
    """Writes random weights with OpenAI's tokenizer."""
    import jax
    import numpy as np

    from clip_jax import models, weights
    from clip_jax.state import init_variables
    from clip_jax.weights.convert import tokens
    from clip_jax.weights.model import Tensors, Weights, variables_by_path

    net = models.create("ViT-B/32", size=SIZES[name])
    variables = jax.jit(lambda: init_variables(net, 0))()
    arrays = variables_by_path(variables)
    shapes = {name: array.shape for name, array in arrays.items()}
    tensors = Tensors(shapes, lambda name: np.asarray(arrays[name]))
    origin = {"source": "random", "format": "clip_jax"}
    made = Weights(net.size, tensors, tokens.OPENAI, origin)
    weights.save(made, folder)


@dataclasses.dataclass
class Clock:
    """A clock of the time spent in the functions that it wraps, nested calls counted once."""

    seconds: float = 0.0

    def iterating(self, function):
        """Wraps a generator function, all of whose steps count."""

        def timed(*arguments, **settings):
            found = iter(function(*arguments, **settings))
            while True:
                began = time.perf_counter()
                item = next(found, None)
                self.seconds += time.perf_counter() - began
                if item is None:
                    return
                yield item

        return timed

    def calling(self, function):
        def timed(*arguments, **settings):
            began = time.perf_counter()
            found = function(*arguments, **settings)
            self.seconds += time.perf_counter() - began
            return found

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--model", choices=SIZES, default="ViT-B/32")
    options = parser.parse_args()
    sys.path.insert(0, str(turns.ROOT))
    began = time.perf_counter()
    from clip_jax import weights
    from clip_jax.embed.encoder import Encoder
    from clip_jax.evaluate import cli

    imported = time.perf_counter() - began
    clock, loading = Clock(), Clock()
    Encoder.images = clock.iterating(Encoder.images)
    Encoder.texts = clock.calling(Encoder.texts)
    weights.open = loading.calling(weights.open)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_set(root / "hundred", options.images)
        write_model(root / "model", options.model)
        began = time.perf_counter()
        cli.main(
            [
                f"--checkpoint={root / 'model'}",
                f"--datasets={root / 'hundred'}",
                "--tasks=zeroshot",
                f"--out={root / 'out'}",
            ]
        )
        total = time.perf_counter() - began
    rest = total - clock.seconds - loading.seconds
    print(f"\n{options.model}, {options.images:,} images: {total:.1f} s, imports {imported:.1f} s")
    for name, seconds in (
        ("encoders", clock.seconds),
        ("loading", loading.seconds),
        ("rest", rest),
    ):
        print(f"  {name:<9} {seconds:7.1f} s  {seconds / total:6.1%}")


if __name__ == "__main__":
    main()
