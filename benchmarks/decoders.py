"""Peak memory and time of decoding one image, by format.

    python benchmarks/decoders.py
    python benchmarks/decoders.py --side=8192 --only="PNG, 16-bit grey"

Makes the pixels that training makes (`images.pixels`, 224 pixels a side), once with a random crop
and once with the middle one, each in a process of its own. The peak is the growth of the greatest
resident memory (VmHWM, which Linux can reset) over the memory before decoding, in bytes per pixel;
the file itself is not counted.
"""

import argparse
import io
import multiprocessing
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clip_jax.common.formatting import aligned
from clip_jax.data import images
from clip_jax.data.crops import CENTER, Crop
from clip_jax.errors import BadExample


def _saved(image: Image.Image, format_: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def _rotated(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _saved(image, "JPEG", exif=exif)


def _grey16(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


FILES: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG": lambda image: _saved(image, "JPEG"),
    "JPEG, progressive": lambda image: _saved(image, "JPEG", progressive=True),
    "JPEG, progressive, 4:4:4": lambda image: _saved(
        image, "JPEG", progressive=True, subsampling=0
    ),
    "JPEG, CMYK": lambda image: _saved(image.convert("CMYK"), "JPEG"),
    "JPEG, rotated by EXIF": _rotated,
    "PNG": lambda image: _saved(image, "PNG", compress_level=1),
    "PNG, palette": lambda image: _saved(image.convert("P"), "PNG", compress_level=1),
    "PNG, transparent": lambda image: _saved(image.convert("RGBA"), "PNG", compress_level=1),
    "PNG, 16-bit grey": lambda image: _saved(_grey16(image), "PNG", compress_level=1),
    "GIF": lambda image: _saved(image.convert("P"), "GIF"),
    "BMP": lambda image: _saved(image, "BMP"),
    "TIFF": lambda image: _saved(image, "TIFF"),
    "TIFF, deflate": lambda image: _saved(image, "TIFF", compression="tiff_adobe_deflate"),
    "TIFF, CMYK": lambda image: _saved(image.convert("CMYK"), "TIFF"),
    "TIFF, 16-bit grey": lambda image: _saved(_grey16(image), "TIFF"),
    "WebP": lambda image: _saved(image, "WEBP", method=0),
    "WebP, lossless": lambda image: _saved(image, "WEBP", lossless=True, method=0, quality=0),
    "WebP, transparent": lambda image: _saved(image.convert("RGBA"), "WEBP", method=0),
    "AVIF": lambda image: _saved(image, "AVIF", speed=10),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--side", type=int, default=4096, help="pixels")
    parser.add_argument("--only", choices=FILES, help="one row")
    options = parser.parse_args()
    names = [options.only] if options.only else list(FILES)
    rows = [("format", "file MB", "random crop B/px", "s", "middle B/px", "s")]
    context = multiprocessing.get_context("spawn")
    for name in names:
        with context.Pool(1) as pool:
            data = pool.apply(_make, (name, options.side))
        cells = []
        for crop in (Crop("random"), CENTER):
            with context.Pool(1, maxtasksperchild=1) as pool:
                peak, seconds = pool.apply(_measure, (data, crop))
            cells += [f"{peak / options.side**2:.1f}", f"{seconds:.1f}"]
        rows.append((name, f"{len(data) / 1e6:.1f}", *cells))
        print(aligned([rows[0], rows[-1]], "<>>>>>").splitlines()[-1], flush=True)
    print()
    print(aligned(rows, "<>>>>>"))


def _make(name: str, side: int) -> bytes:
    """Makes a file: a gradient with noise of 64 x 64 pixels over it, repeated."""
    rng = np.random.default_rng(0)
    tile = rng.integers(0, 64, (64, 64, 3), np.uint8)
    pixels = np.tile(tile, (side // 64, side // 64, 1))
    pixels += np.linspace(0, 191, side).astype(np.uint8)[:, None]
    return FILES[name](Image.fromarray(pixels))


def _measure(data: bytes, crop: Crop) -> tuple[int, float]:
    """Returns the growth of the greatest resident memory, in bytes, and the seconds."""
    rng = np.random.default_rng(0)
    images.pixels(_make("PNG", 64), "warm-up", 224, crop, rng)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the memory of now
    before = _peak()
    begun = time.perf_counter()
    try:
        images.pixels(data, "file", 224, crop, rng)
    except BadExample as error:
        print(error)
    return _peak() - before, time.perf_counter() - begun


def _peak() -> int:
    """Returns the greatest resident memory since it was reset, in bytes."""
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) * 1024


if __name__ == "__main__":
    main()
