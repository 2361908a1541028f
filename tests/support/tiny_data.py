"""Small images and samples for the tests of the data commands."""

import io

import numpy as np
from PIL import Image


def encoded(image: Image.Image, format_: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A smooth random scene, unlike that of any other seed; size is width, height."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def sample(key: str, image: bytes, caption: str | bytes) -> list[tuple[str, bytes]]:
    """The two files of a sample."""
    text = caption if isinstance(caption, bytes) else caption.encode()
    return [(f"{key}.jpg", image), (f"{key}.txt", text)]
