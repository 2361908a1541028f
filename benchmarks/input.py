"""Input speed, from JPEG files in tar shards to batches: clip_jax next to open_clip.

    python benchmarks/input.py
    python benchmarks/input.py --shards="DIR/*.tar"

Needs open_clip_torch, webdataset and pandas. Without --shards it writes made-up photographs, some
400 x 300 pixels at JPEG quality 90, to a temporary directory. See benchmarks/README.md for what is
compared.

Every competitor has its own process, and they take turns. A pass is a number of batches from a new
pipeline, including the start of its threads.
"""

import argparse
import io
import itertools
import statistics
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import turns
from PIL import Image, ImageDraw
from tokenizer import Captions
from turns import Step

# Named by data.crop; open_clip's transform is "resized". "synthetic" reads no files. Processes have
# one thread each, and are as many as open_clip's.
COMPETITORS = (
    "open_clip",
    "clip_jax resized",
    "clip_jax resized in processes",
    "clip_jax random",
    "clip_jax synthetic",
)
SIZE, CONTEXT = 224, 77
SHARD = 256  # made-up examples in a shard


# ---- The data ------------------------------------------------------------------------------------


def write_shards(directory: Path, count: int) -> str:
    """Writes `count` made-up examples; returns the pattern of the shards."""
    rng, captions = np.random.default_rng(0), Captions(0)
    for number, start in enumerate(range(0, count, SHARD)):
        with tarfile.open(directory / f"{number:05}.tar", "w") as tar:
            for key in range(start, min(count, start + SHARD)):
                _add(tar, f"{key:08}.jpg", photograph(rng))
                _add(tar, f"{key:08}.txt", captions.caption("plain ASCII").encode())
    return str(directory / "*.tar")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def photograph(rng: np.random.Generator) -> bytes:
    """Draws soft light, hard edges and grain; returns a JPEG of some 45 kB, like a photograph."""
    width, height = int(rng.integers(380, 421)), int(rng.integers(285, 316))
    if rng.random() < 0.3:
        width, height = height, width
    size = width, height
    picture = _noise(rng, (5, 4), size)
    draw = ImageDraw.Draw(picture)
    for _ in range(12):
        corners = rng.integers(0, max(size), (3, 2))
        draw.polygon([(int(x), int(y)) for x, y in corners], fill=tuple(rng.integers(0, 256, 3)))
    for cell, weight in ((16, 0.25), (4, 0.2), (1, 0.08)):
        texture = _noise(rng, (width // cell, height // cell), size)
        picture = Image.blend(picture, texture, weight)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


def _noise(rng: np.random.Generator, cells: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    pixels = rng.integers(0, 256, (cells[1], cells[0], 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


# ---- Competitors: each makes a Step that takes `batches` batches ---------------------------------


def clip_jax_pass(
    shards: str, crop: str, batch_size: int, batches: int, threads: int, processes: int = 0
) -> Step:
    """Runs the training pipeline: uint8 pixels and ids on the device; "": synthetic data."""
    import jax

    from clip_jax import sharding
    from clip_jax.configs import default
    from clip_jax.data import mixture, rows, tokenizer
    from clip_jax.data.feed import Feed
    from clip_jax.data.pipeline import TrainPipeline

    config = default.get_config().data
    config.crop, config.threads, config.processes = crop, threads, processes
    config.source = default.source(type="tar" if shards else "synthetic", path=shards, size=2048)
    source, order = mixture.create(config, SIZE, seed=0, batch_size=batch_size, parts=1)
    tokens = tokenizer.create("openai", CONTEXT)
    spec = rows.Spec(
        config=config,
        tokenizer="openai",
        context_length=CONTEXT,
        image_size=SIZE,
        seed=0,
        batch_size=batch_size,
    )
    place = sharding.batch_sharding(sharding.make_mesh())
    passes = itertools.count()

    def take_pass() -> float:
        start = next(passes) * batches * batch_size
        pipeline = TrainPipeline(source, order, tokens, spec, start=start)
        feed = Feed(pipeline, place, depth=config.prefetch)
        for batch in itertools.islice(feed, batches):
            jax.block_until_ready(batch)
        feed.close()
        return float(pipeline.skipped.total())

    return take_pass


def open_clip_pass(shards: str, batch_size: int, batches: int, workers: int) -> Step:
    """Runs open_clip's loader, transform and tokenizer: float32 pixels and ids as torch tensors."""
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from open_clip_train.data import get_wds_dataset

    paths = sorted(map(str, Path(shards).parent.glob(Path(shards).name)))
    settings = argparse.Namespace(
        train_data="::".join(paths),
        train_data_upsampling_factors=None,
        train_num_samples=batches * batch_size,
        dataset_resampled=True,
        batch_size=batch_size,
        workers=workers,
        world_size=1,
        seed=0,
    )
    transform = image_transform_v2(PreprocessCfg(size=SIZE), is_train=True)
    data = get_wds_dataset(
        settings, transform, is_train=True, tokenizer=open_clip.get_tokenizer("ViT-B-32")
    )
    epochs = itertools.count()

    def take_pass() -> float:
        data.set_epoch(next(epochs))
        seen = sum(len(images) for images, _ in data.dataloader)
        return float(batches * batch_size - seen)

    return take_pass


def prepare(competitor: str, args: argparse.Namespace) -> Step:
    common = args.batch_size, args.batches, args.workers
    if competitor == "open_clip":
        return open_clip_pass(args.shards, *common)
    kind, _, processes = competitor.removeprefix("clip_jax ").partition(" in ")
    if kind == "synthetic":
        return clip_jax_pass("", "random", *common)
    return clip_jax_pass(args.shards, kind, *common, args.workers if processes else 0)


def report(workers: list[turns.Worker], images: int) -> None:
    """Prints a table; ratios are of medians, to the first competitor."""
    rates = {each.competitor: [images / step["seconds"] for step in each.steps] for each in workers}
    base, *_ = map(statistics.median, rates.values())
    print(f"| | images/s | slowest - fastest pass | over {next(iter(rates))} |")
    print("|---|---|---|---|")
    for name, found in rates.items():
        median = statistics.median(found)
        print(
            f"| {name} | {median:,.0f} | {min(found):,.0f} - {max(found):,.0f} "
            f"| {median / base:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shards", default="", help="pattern of tar shards, such as DIR/*.tar")
    parser.add_argument("--images", type=int, default=2048, help="examples to make up otherwise")
    parser.add_argument("--passes", type=int, default=5, help="passes of each competitor")
    parser.add_argument("--batches", type=int, default=32, help="batches in a pass")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2, help="threads or, open_clip, processes")
    parser.add_argument("--only", default=",".join(COMPETITORS), help="competitors, by commas")
    parser.add_argument("--verbose", action="store_true", help="show what the processes print")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        turns.work(lambda: (prepare(args.worker, args), {}))
        return
    with tempfile.TemporaryDirectory() as directory:
        if not args.shards:
            sys.argv.append(f"--shards={write_shards(Path(directory), args.images)}")
        workers = turns.take_turns(__file__, args.only.split(","), args.passes)
    print(turns.versions("open_clip_torch", "webdataset", "torch", "pillow", "simplejpeg", "jax"))
    report(workers, args.batches * args.batch_size)


if __name__ == "__main__":
    main()
