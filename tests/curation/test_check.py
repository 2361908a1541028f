"""`data check` against shards with one fault each, and how data are named on the command line."""

import argparse
import json
import struct
import tarfile
import zlib

import pytest
from PIL import Image
from shards import write_tar
from tiny_data import encoded, picture, sample

from clip_jax.common import commands
from clip_jax.curation import cli as data_cli
from clip_jax.curation import parallel
from clip_jax.data import arguments
from clip_jax.errors import UserError


def bomb() -> bytes:
    """The header of a PNG of 30,000 x 30,000 pixels, without the pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunks = [(header, 13), (b"IDAT", 0)]
    pieces = [struct.pack(">I", n) + c + struct.pack(">I", zlib.crc32(c)) for c, n in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(pieces)


def film() -> bytes:
    return encoded(picture(1), "GIF", save_all=True, append_images=[picture(2)])


GOOD = encoded(picture(0), "JPEG")
# Key: (image, caption, the reason it is left out for).
FAULTS = {
    "empty_file": (b"", "a caption", "empty image file"),
    "page": (b"<!DOCTYPE html><html>404</html>", "a caption", "HTML instead of an image"),
    "cut": (GOOD[: len(GOOD) // 2], "a caption", "unreadable image"),
    "bomb": (bomb(), "a caption", "too many pixels"),
    "film": (film(), "a caption", "animated image"),
    "long": (GOOD, "word " * 200_000, "caption too long"),
    "latin1": (GOOD, b"caf\xe9", "invalid UTF-8 caption"),
    "space": (GOOD, "&nbsp; ", "empty caption"),
}


@pytest.fixture
def shards(tmp_path):
    """A shard of faults, one with a lonely image and a repeated key, and one cut short."""
    folder = tmp_path / "shards"
    folder.mkdir()
    good = [m for i in range(5) for m in sample(f"good{i}", GOOD, "a caption")]
    bad = [m for key, (image, text, _) in FAULTS.items() for m in sample(key, image, text)]
    write_tar(folder / "0.tar", [*bad, *good])
    write_tar(folder / "1.tar", [("lonely.jpg", GOOD), *good, *good[:2]])
    write_tar(folder / "2.tar", good)
    with tarfile.open(folder / "2.tar") as tar:
        last = tar.getmembers()[-1].offset_data
    (folder / "2.tar").write_bytes((folder / "2.tar").read_bytes()[:last])
    return folder


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as ended:
        data_cli.main(["check", *argv])
    return ended.value.code


@pytest.mark.parametrize("workers", ["1", "2"])
def test_every_fault_is_found_and_nothing_else(shards, tmp_path, capsys, monkeypatch, workers):
    monkeypatch.setattr(parallel, "PART", 4)
    output = tmp_path / "report"
    assert run(str(shards), f"--out={output}", f"--workers={workers}") == 1
    lines = [json.loads(line) for line in (output / "bad.jsonl").read_text().splitlines()]
    assert {bad["key"]: bad["reason"] for bad in lines} == {
        f"0.tar/{key}": reason for key, (_, _, reason) in FAULTS.items()
    }
    assert all(bad.keys() >= {"key", "reason", "detail"} for bad in lines)
    assert [bad["index"] for bad in lines] == list(range(len(FAULTS)))
    summary = json.loads((output / "summary.json").read_text())
    assert summary["reasons"] == {reason: 1 for _, _, reason in FAULTS.values()}
    assert summary["index"] == {"no caption": 1, "repeated key": 1, "damaged shard": 1}
    assert summary["examples"] == len(FAULTS) + 5 + 6 + 4
    printed = capsys.readouterr().out
    assert "unreadable image" in printed
    assert "0.tar/cut" in printed


def test_status_follows_max_skipped(tmp_path):
    write_tar(tmp_path / "a.tar", [m for i in range(9) for m in sample(f"{i}", GOOD, "a caption")])
    report = f"--out={tmp_path / 'report'}"
    assert run(str(tmp_path), report, "--workers=1") == 0
    assert (tmp_path / "report" / "bad.jsonl").read_text() == ""
    members = [m for i in range(9) for m in sample(f"{i}", GOOD, "a caption")]
    write_tar(tmp_path / "a.tar", [*members, *sample("9", b"", "a caption")])
    assert run(str(tmp_path), report, "--workers=1", "--max_skipped=0.09") == 1
    assert run(str(tmp_path), report, "--workers=1", "--max_skipped=0.1") == 0


def named(data: str, *argv: str) -> dict:
    options = arguments.parser("check", "").parse_args([data, *argv])
    return dict(arguments.data(data, options).spec)


def test_kinds_of_data(tmp_path):
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", [])
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "train.tfrecord-00000-of-00001").write_bytes(b"")
    (tmp_path / "images").mkdir()
    for data, kind in [
        ("shards/*.tar", "tar"),
        ("gs://bucket/{00000..00012}.tar", "tar"),
        ("a.tar, b.tar", "tar"),
        (str(tmp_path / "tars"), "tar"),
        ("data/train.tfrecord*", "tfrecord"),
        (str(tmp_path / "records"), "tfrecord"),
        (str(tmp_path / "images"), "folder"),
    ]:
        assert named(data)["type"] == kind
        assert named(data)["path"] == data
    spec = named("tfds:coco_captions:1.1.0", "--split=val", "--text_key=captions/text")
    assert (spec["type"], spec["name"], spec["split"]) == ("tfds", "coco_captions:1.1.0", "val")
    assert spec["text_key"] == "captions/text"
    assert (named("digits:test")["type"], named("digits:test")["split"]) == ("digits", "test")


def test_mistakes(tmp_path, capsys):
    with pytest.raises(UserError, match=r"neither a directory.*\.tar"):
        named(str(tmp_path / "absent"))
    assert run(str(tmp_path / "absent")) == 2
    assert run(str(tmp_path), "--max_skipped=2") == 2
    assert "not between 0 and 1" in capsys.readouterr().err
    assert run(str(tmp_path), "--workers=-1") == 2
    assert run("https://host/0.tar") == 2
    assert "https:// is not read" in capsys.readouterr().err
    assert run("pipe:cat 0.tar") == 2
    assert run("digits:test", "--out=hf://host/check") == 2
    assert "hf:// is not read" in capsys.readouterr().err
    assert run("--help") == 0
    assert "python -m clip_jax data check" in capsys.readouterr().out
    with pytest.raises(argparse.ArgumentTypeError):
        commands.at_least(1)("0")


def test_two_captions_are_both_tried(tmp_path):
    for name, second in (("fine", "another"), ("blank", "&nbsp;")):
        image = encoded(Image.new("RGB", (8, 8)))
        record = json.dumps({"caption": ["a caption", second]}).encode()
        write_tar(tmp_path / f"{name}.tar", [("0.png", image), ("0.json", record)])
    report = f"--out={tmp_path / 'report'}"
    assert run(str(tmp_path / "fine.tar"), report, "--workers=1") == 0
    assert run(str(tmp_path / "blank.tar"), report, "--workers=1") == 1
