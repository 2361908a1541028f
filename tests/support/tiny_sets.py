"""Data sets of embedded digits in the forms that evaluation sets come in, for tests."""

import io
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image
from shards import write_tar

from clip_jax.data.sources.digits import DigitScenes

SIDE = 16  # pixels


def digits(count: int, split: str = "test") -> list[tuple[Image.Image, int]]:
    """Single digits, every one drawn, and what they show."""
    source = DigitScenes(split, SIDE, seed=0)
    places = np.linspace(0, len(source) - 1, count, dtype=int).tolist()
    return [(Image.fromarray(source[i].image), source[i].label) for i in places]


def encoded(image: Image.Image, format_: str = "WEBP") -> bytes:
    file = io.BytesIO()
    image.save(file, format_, lossless=True)
    return file.getvalue()


def npy(values: Sequence[float], dtype: type = np.float32) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(values, dtype))
    return file.getvalue()


def write_benchmark(
    root: pathlib.Path,
    split: str,
    files: Sequence[tuple[str, bytes]],
    *,
    shards: int = 1,
    **described: str,
) -> None:
    """A split in CLIP_benchmark's layout.

    Args:
      root: directory of the set.
      split: its name.
      files: kind and contents of the file beside the image, for each sample.
      shards: number of them.
      described: contents of the files that describe the set, by name without suffix.
    """
    (root / split).mkdir(parents=True)
    for name, text in described.items():
        (root / f"{name}.txt").write_text(text)
    images = [encoded(image) for image, _ in digits(len(files))]
    members = [
        [(f"s{i:07}.webp", images[i]), (f"s{i:07}.{kind}", data)]
        for i, (kind, data) in enumerate(files)
    ]
    per_shard = -(-len(files) // shards)
    for shard in range(shards):
        part = members[shard * per_shard : (shard + 1) * per_shard]
        write_tar(root / split / f"{shard}.tar", [file for files in part for file in files])
    (root / split / "nshards.txt").write_text(f"{shards}\n")
