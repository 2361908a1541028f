"""Everything that is wrong with data from the web: none of it ends a run, each is counted."""

import io
import itertools
import struct
import zlib

import pytest
from PIL import Image
from shards import picture, sample, write_tar

from clip_jax.configs import default
from clip_jax.data import mixture, pipeline, rows, tokenizer
from clip_jax.errors import UserError
from clip_jax.storage import faults

TOKENIZER = tokenizer.create("openai", 16)
GOOD = 6  # sound samples in each shard


def huge_png() -> bytes:
    """A file of some hundred bytes that says it is 30,000 x 30,000."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def animated_gif() -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in (0, 200)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def cut_jpeg() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(file, "JPEG")
    return file.getvalue()[:-700]


CAPTION = b"a caption"
# What a sample of two files holds, and what it is counted under while it is read.
FAULTS = {
    "empty image file": (b"", CAPTION),
    "HTML instead of an image": (b"<!DOCTYPE html><html><body>404</body></html>", CAPTION),
    "unreadable image": (cut_jpeg(), CAPTION),
    "too many pixels": (huge_png(), CAPTION),
    "animated image": (animated_gif(), CAPTION),
    "caption too long": (picture(1), b"word " * 210_000),
    "invalid UTF-8 caption": (picture(1), b"caf\xe9"),
    "empty caption": (picture(1), b" \n"),
}


@pytest.fixture
def shards(tmp_path):
    """Sound samples, each fault once, a repeated key, names that lead out, and damaged shards."""
    for shard in range(4):
        members = [m for i in range(GOOD) for m in sample(f"{i}", f"good {shard} {i}")]
        if shard == 0:
            for number, (image, text) in enumerate(FAULTS.values()):
                members += [(f"bad{number}.jpg", image), (f"bad{number}.txt", text)]
        if shard == 1:
            members += [("alone.png", picture(1)), ("lonely.txt", CAPTION)]
            members += [("0.png", picture(9)), ("0.txt", b"good again")]
            members += [("../../etc/cron.d/evil.png", picture(1))]
        write_tar(tmp_path / f"{shard}.tar", members)
    cut = (tmp_path / "2.tar").read_bytes()
    (tmp_path / "4.tar").write_bytes(cut[: len(cut) // 2])
    (tmp_path / "5.tar").write_bytes(b"<html>not a tar</html>" * 100)
    return tmp_path


def start(path, **overrides) -> pipeline.TrainPipeline:
    config = default.get_config().data
    config.source = default.source(type="tar", path=str(path / "{0..6}.tar"))
    config.update({"threads": 2, "max_skipped": 1.0, **overrides})
    source, order = mixture.create(config, 8, 0, batch_size=4, parts=1)
    spec = rows.Spec(config, "openai", 16, image_size=8, seed=0, batch_size=4)
    return pipeline.TrainPipeline(source, order, TOKENIZER, spec)


def captions(batches, steps: int) -> list[str]:
    taken = itertools.islice(batches, steps)
    return [TOKENIZER.decode(row) for batch in taken for row in batch["tokens"]]


@pytest.mark.parametrize("order", ["shuffled", "windowed"])
def test_each_is_counted_and_nothing_else_is_lost(shards, order):
    run = start(shards, order=order)
    assert run._rows._source.problems == {
        "damaged shard": 3,  # one cut, one no tar file, one not there
        "no caption": 1,
        "no image": 1,
        "repeated key": 1,
        "unsafe file name": 1,
    }
    whole = {f"good {shard} {i}" for shard in range(4) for i in range(GOOD)} | {"good again"}
    size = run.examples_per_epoch
    assert len(FAULTS) + len(whole) <= size < len(FAULTS) + len(whole) + GOOD
    # A multiple of the batch, so that whole epochs have gone by.
    assert set(captions(iter(run), size)) == whole
    assert run.skipped.keys() == FAULTS.keys()
    assert set(run.skipped.values()) == {4}


def test_a_shard_that_is_deleted_during_the_run(shards, monkeypatch):
    monkeypatch.setattr(faults, "BRIEF", (0.01,))
    run = start(shards, order="stored", prefetch=1)
    batches = iter(run)
    captions(batches, 1)
    (shards / "3.tar").unlink()
    found = set(captions(batches, 2 * run.examples_per_epoch // 4))
    assert run.skipped["missing shard"] >= GOOD
    assert {f"good {shard} {i}" for shard in range(3) for i in range(GOOD)} <= found
    assert not any(text.startswith("good 3") for text in found)


def test_too_much_of_it_ends_the_run_with_the_list(shards):
    with pytest.raises(UserError, match=r"max_skipped = 0\.1 allows.*1 unreadable image") as caught:
        captions(iter(start(shards, max_skipped=0.1, order="stored", threads=1)), 40)
    assert "0.tar/bad2" in str(caught.value)
