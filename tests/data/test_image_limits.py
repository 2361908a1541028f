"""Pictures of strangers: the formats that are opened, and the most that one may cost."""

import ast
import pathlib
import pickle
import re
import struct
import subprocess
import sys

import pytest
from PIL import EpsImagePlugin, Image
from tiny_data import encoded

from clip_jax.data import images
from clip_jax.errors import BadExample


def test_only_the_meant_formats_are_opened(monkeypatch):
    """Bytes of a data set must not start Ghostscript, nor reach decoders that are seldom used."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("it ran"))
    picture = Image.new("RGB", (8, 8), "red")
    for format_ in ("EPS", "DDS", "ICO", "ICNS", "IM", "PCX", "SGI", "TGA", "MSP", "SPIDER", "XBM"):
        mode = {"MSP": "1", "XBM": "1", "SPIDER": "F", "ICNS": "RGB"}.get(format_, "RGB")
        data = encoded(picture.convert(mode).resize((32, 32)), format_)
        with pytest.raises(BadExample) as caught:
            images.decode(data, "x")
        assert (caught.value.reason, caught.value.detail) == (
            "unreadable image",
            "no known image format",
        ), format_
    for format_ in ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"):
        assert images.decode(encoded(picture, format_), "x").size == (8, 8), format_


def test_files_are_opened_in_one_place():
    root = pathlib.Path(images.__file__).parents[2]
    scripts = [*root.glob("clip_jax/**/*.py"), *root.glob("configs/*.py"), root / "main.py"]
    calls = {
        (path.name, ast.unparse(node.func))
        for path in scripts
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
    }
    found = {
        (name, call) for name, call in calls if call.endswith(("Image.open", "ImageFile.open"))
    }
    assert found == {("images.py", "Image.open")}


def test_scans_of_a_progressive_jpeg_are_bounded(monkeypatch):
    """A file may repeat a scan thousands of times, and each costs as much as a picture."""
    data = encoded(Image.new("RGB", (64, 64), "red"), "JPEG", progressive=True)
    assert images.decode(data, "x").size == (64, 64)
    last = data.rindex(b"\xff\xda")
    repeated = data[:last] + data[last:-2] * 3000 + data[-2:]
    monkeypatch.setattr(images, "_MAX_SCANNED", 64 * 64 * 100)
    with pytest.raises(BadExample, match="too many scans"):
        images.decode(repeated, "x")


@pytest.mark.parametrize(
    ("kind", "bound"),
    [("PNG, 16-bit grey", 18), ("PNG, transparent", 18), ("JPEG, progressive", 18)],
)
def test_memory_of_a_large_picture(kind, bound):
    """The peak stays below as many bytes per pixel as benchmarks/README.md states."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    script = pathlib.Path(__file__).parents[2] / "benchmarks" / "decoders.py"
    command = [sys.executable, str(script), f"--kind={kind}", "--side=3000"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(rf"^{kind} +([\d.]+)", ran.stdout, re.MULTILINE)
    assert found, ran.stdout
    assert 3 < float(found[1]) < bound


def reason(data: bytes) -> str:
    with pytest.raises(BadExample) as caught:
        images.decode(data, "x")
    assert caught.value.key == "x"
    return caught.value.reason


def tiff(**tags: list[int]) -> bytes:
    """A grey TIFF of 8 x 8 pixels without contents; each tag of 32-bit numbers by its number."""
    found = {256: [8], 257: [8], 258: [8], 259: [1], 262: [1], 277: [1]}
    found |= {int(name[1:]): values for name, values in tags.items()}
    place = 8 + 2 + 12 * len(found) + 4
    entries, extra = b"", b""
    for tag, values in sorted(found.items()):
        data = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            data, extra = struct.pack("<I", place + len(extra)), extra + data
        entries += struct.pack("<HHI", tag, 4, len(values)) + data
    return b"II*\0" + struct.pack("<IH", 8, len(found)) + entries + bytes(4) + extra + bytes(64)


def test_small_pictures_that_cost_much_are_refused():
    tiles = tiff(t322=[2**15], t323=[2**15], t324=[200], t325=[64])
    assert reason(tiles) == "too many pixels"
    strips = tiff(t273=[200] * 200_000, t278=[1], t279=[8] * 200_000)
    assert reason(strips) == "unreadable image"
    assert images.decode(tiff(t273=[122], t278=[8], t279=[64]), "x").size == (8, 8)
    assert reason(b"P3 2 2 255\n" + b"1 " * 12) == "unreadable image"
    image = Image.new("RGB", (9, 9))
    profile = encoded(image, "TIFF", icc_profile=bytes(10**6))  # one value of many bytes
    assert images.decode(profile, "x").size == (9, 9)


def test_damaged_metadata_and_large_pictures_print_nothing():
    exif = struct.pack(">2sHIHHHI4sI", b"MM", 42, 8, 1, 0x010E, 2, 99, b"\0\0\xff\0", 0)
    data = encoded(Image.new("RGB", (9, 9)), "JPEG", exif=b"Exif\0\0" + exif)
    huge = encoded(Image.new("1", (10_000, 10_000)), "PNG")
    script = (
        "import sys, pickle; from clip_jax.data import images; from clip_jax.errors import *\n"
        "for data in pickle.load(sys.stdin.buffer):\n"
        "    try: images.decode(data, 'k')\n"
        "    except BadExample as error: print(error.reason)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps([data, huge]), capture_output=True
    )
    assert (ran.stdout.decode().strip(), ran.stderr.decode()) == ("too many pixels", "")
