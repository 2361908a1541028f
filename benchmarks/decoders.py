"""Peak memory and time of decoding one large picture, by its format and kind of pixels.

    python benchmarks/decoders.py

Each picture is decoded in a process of its own, whose peak before that is subtracted. The bound on
the memory of a training run is data.threads x 67,108,864 pixels x the largest number printed.
"""

import argparse
import io
import json
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
# name: (Pillow's mode, format, options of the writer)
KINDS = {
    "JPEG": ("RGB", "JPEG", {"quality": 90}),
    "JPEG, progressive": ("RGB", "JPEG", {"quality": 90, "progressive": True}),
    "JPEG, CMYK": ("CMYK", "JPEG", {}),
    "JPEG, turned by EXIF": (
        "RGB",
        "JPEG",
        {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"},
    ),
    "PNG": ("RGB", "PNG", {}),
    "PNG, transparent": ("RGBA", "PNG", {}),
    "PNG, grey and transparent": ("LA", "PNG", {}),
    "PNG, palette": ("P", "PNG", {}),
    "PNG, 16-bit grey": ("I;16", "PNG", {}),
    "WebP": ("RGB", "WEBP", {}),
    "WebP, transparent": ("RGBA", "WEBP", {}),
    "GIF": ("P", "GIF", {}),
    "BMP": ("RGB", "BMP", {}),
    "TIFF": ("RGB", "TIFF", {}),
    "JPEG 2000": ("RGB", "JPEG2000", {}),
    "AVIF": ("RGB", "AVIF", {}),
}


def write(kind: str, side: int, path: str) -> None:
    """Writes a picture of smooth gradients, the same in every kind."""
    import numpy as np
    from PIL import Image

    mode, format_, options = KINDS[kind]
    levels = np.linspace(0, 255, side).astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray(np.tile(levels.astype(np.uint16) * 257, (side, 1)))
    else:
        image = Image.fromarray(np.tile(levels, (side, 1))).convert("RGB").convert(mode)
    image.save(path, format_, **options)


def decode(path: str) -> dict[str, float]:
    """Decodes a file; returns bytes of memory per pixel beyond the file, and the seconds."""
    import numpy as np
    from PIL import Image

    sys.path.insert(0, str(ROOT))
    from clip_jax.data import images

    data = pathlib.Path(path).read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        pixels = image.width * image.height
    small = io.BytesIO()  # loads the decoders
    Image.new("RGB", (8, 8)).save(small, "PNG")
    images.decode(small.getvalue(), "small")
    before, began = _peak(), time.perf_counter()
    np.asarray(images.decode(data, path))
    seconds = time.perf_counter() - began
    return {"bytes": max(0, _peak() - before) / pixels, "seconds": seconds}


def _peak() -> int:
    """The most memory that this process has held, in bytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def measure(kind: str, side: int) -> dict[str, float]:
    """Measures a kind of picture in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/picture"
        write(kind, side, path)
        ran = subprocess.run(
            [sys.executable, __file__, "--decode", path], capture_output=True, check=True
        )
    return json.loads(ran.stdout)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--side", type=int, default=8192, help="pixels along a side")
    parser.add_argument("--kind", choices=KINDS, help="only this kind")
    parser.add_argument("--decode", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.decode:
        print(json.dumps(decode(options.decode)))
        return
    print(f"{options.side} x {options.side} pixels     bytes per pixel   peak MiB   seconds")
    for kind in [options.kind] if options.kind else KINDS:
        found = measure(kind, options.side)
        mebibytes = found["bytes"] * options.side**2 / 2**20
        print(f"{kind:28} {found['bytes']:12.1f} {mebibytes:10,.0f} {found['seconds']:9.2f}")


if __name__ == "__main__":
    main()
