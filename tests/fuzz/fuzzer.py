"""Damaged and hostile files for every reader of files; see test_fuzz.py.

    PYTHONPATH=.:tests/support python tests/fuzz/fuzzer.py --cases=5000 --seed=1
    PYTHONPATH=.:tests/support python tests/fuzz/fuzzer.py --only=tar --seed=1 --first=812 --cases=1

Each case copies the sound files of a target, damages one of them, and reads them all. A finding is
any error other than the package's own, a warning, a case that takes too long or too much memory,
or a file written beside the case's folder. The cases of a seed are always the same. They run in a
process of their own, which is started again after the case that crashed it.
"""

import argparse
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

SECONDS = 20  # of CPU
MEBIBYTES = 800


class Target(NamedTuple):
    """A reader of files.

    Attributes:
      make: writes sound files into a folder.
      read: reads them; may raise the package's errors.
    """

    make: Callable[[pathlib.Path], None]
    read: Callable[[pathlib.Path], None]


# ---- Targets -----------------------------------------------------------------------------------


def _encode(image, format_: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def _make_images(folder: pathlib.Path) -> None:
    from PIL import Image

    image = Image.effect_noise((40, 24), 60).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    grey16 = Image.fromarray(np.arange(960, dtype=np.uint16).reshape(24, 40) * 68)
    files = {
        "a.jpg": _encode(image, "JPEG", exif=exif),
        "progressive.jpg": _encode(image, "JPEG", progressive=True),
        "cmyk.jpg": _encode(image.convert("CMYK"), "JPEG"),
        "a.png": _encode(image, "PNG", exif=exif),
        "palette.png": _encode(image.convert("P"), "PNG", transparency=3),
        "grey16.png": _encode(grey16, "PNG"),
        "a.gif": _encode(image.convert("P"), "GIF"),
        "film.gif": _encode(image, "GIF", save_all=True, append_images=[image.rotate(9)]),
        "a.bmp": _encode(image, "BMP"),
        "a.tif": _encode(image, "TIFF"),
        "deflated.tif": _encode(image, "TIFF", compression="tiff_adobe_deflate"),
        "grey16.tif": _encode(grey16, "TIFF"),
        "a.webp": _encode(image, "WEBP"),
        "transparent.webp": _encode(image.convert("RGBA"), "WEBP", lossless=True, exif=exif),
        "a.jp2": _encode(image, "JPEG2000"),
        "a.avif": _encode(image, "AVIF", speed=10),
        "a.ppm": _encode(image, "PPM"),
        "a.eps": _encode(image, "EPS"),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _read_images(folder: pathlib.Path) -> None:
    from clip_jax.data import images
    from clip_jax.data.crops import CENTER, Crop

    for path in sorted(folder.iterdir()):
        for crop in (CENTER, Crop("random")):
            rng = np.random.default_rng(0)
            with _bad_examples():
                found = images.pixels(path.read_bytes(), path.name, 16, crop, rng)
                assert found.shape == (16, 16, 3)


def _picture() -> bytes:
    from PIL import Image

    return _encode(Image.new("RGB", (5, 4), (200, 30, 30)), "PNG")


def _source(**spec) -> Callable[[pathlib.Path], None]:
    """Returns a reader of all examples of a source; `path` is relative to the folder."""

    def read(folder: pathlib.Path) -> None:
        from clip_jax.configs import default
        from clip_jax.data import images
        from clip_jax.data.crops import CENTER
        from clip_jax.data.sources import opening

        path = str(folder / spec["path"])
        source = opening.create(default.source(**spec | {"path": path}), image_size=16, seed=0)
        for index in range(min(len(source), 30)):
            with _bad_examples():
                example = source[index]
                images.pixels(example.image, example.key, 16, CENTER, None)

    return read


def _make_tar(folder: pathlib.Path) -> None:
    from shards import write_tar

    members = []
    for i in range(4):
        key = f"{i:05d}" if i < 3 else "ü" * 60
        members += [(f"{key}.png", _picture()), (f"{key}.txt", f"caption {i}".encode())]
        record = {"caption": f"caption {i}", "label": i, "alt": ["a", "b"]}
        members += [(f"{key}.json", json.dumps(record).encode())]
        members += [(f"{key}.cls", str(i).encode())]
        labels = io.BytesIO()
        np.save(labels, np.array([0, i, 1]))
        members += [(f"{key}.npy", labels.getvalue())]
    (folder / "train").mkdir()
    write_tar(folder / "train" / "0.tar", members)
    (folder / "classnames.txt").write_text("\n".join("abcdef"))
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of {c}\n")


def _make_index(folder: pathlib.Path) -> None:
    _make_tar(folder)
    _source(type="tar", path="train/0.tar")(folder)


def _make_table(suffix: str) -> Callable[[pathlib.Path], None]:
    def make(folder: pathlib.Path) -> None:
        rows = [(f"{i}.png", f'caption "{i}", é', i) for i in range(4)]
        for name, _, _ in rows:
            (folder / name).write_bytes(_picture())
        if suffix == "jsonl":
            names = ("image", "caption", "label")
            text = "".join(json.dumps(dict(zip(names, row))) + "\n" for row in rows)
        else:
            separator = {"csv": ",", "tsv": "\t"}[suffix]
            lines = [
                separator.join((name, '"' + caption.replace('"', '""') + '"', str(i)))
                for name, caption, i in rows
            ]
            text = "\n".join([separator.join(("image", "caption", "label")), *lines])
        (folder / f"captions.{suffix}").write_text(text)

    return make


def _make_parquet(folder: pathlib.Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "image": [{"bytes": _picture(), "path": f"{i}.png"} for i in range(6)],
        "caption": [f"caption {i}" for i in range(6)],
        "label": list(range(6)),
    }
    pq.write_table(pa.table(columns), folder / "0.parquet", row_group_size=3)


def _make_folder(folder: pathlib.Path) -> None:
    for i in range(3):
        (folder / f"{i}.png").write_bytes(_picture())
        record = {"caption": f"caption {i}", "label": [i], "weight": 0.5}
        (folder / f"{i}.json").write_text(json.dumps(record))


def _make_records(folder: pathlib.Path) -> None:
    import tensorflow as tf

    def feature(value: bytes) -> "tf.train.Feature":
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    with tf.io.TFRecordWriter(str(folder / "a.tfrecord")) as writer:
        for i in range(4):
            named = {"image": feature(_picture()), "caption": feature(f"caption {i}".encode())}
            example = tf.train.Example(features=tf.train.Features(feature=named))
            writer.write(example.SerializeToString())


def _make_weights(kind: str, form: str) -> Callable[[pathlib.Path], None]:
    def make(folder: pathlib.Path) -> None:
        import tiny_weights

        from clip_jax.weights import folder as own
        from clip_jax.weights.convert import big_vision, huggingface, open_clip, openai

        weights = tiny_weights.make(kind)
        if form == "clip_jax":
            own.write(weights, folder / "model")
        elif form == "transformers":
            huggingface.write(weights, folder / "model")
        elif form == "open_clip":
            open_clip.write(weights, folder / "model")
        elif form == "openai":
            openai.write(weights, folder / "model.pt")
        else:
            big_vision.write(weights, folder / "model.npz")

    return make


def _read_weights(name: str = "model") -> Callable[[pathlib.Path], None]:
    def read(folder: pathlib.Path) -> None:
        from etils import epath

        from clip_jax.data import tokenizer
        from clip_jax.weights import opening

        weights = opening.open_model(epath.Path(folder / name), None, "", "", "")
        for each in weights.tensors.shapes:
            weights.tensors.read(each)
        if weights.tokenizer.path is not None:
            tokenizer.create(str(weights.tokenizer.path), 10)(["a photo of a cat"])

    return read


def _make_metrics(folder: pathlib.Path) -> None:
    rows = [{"step": i, "loss": 1 / (i + 1), "data/skipped": 0} for i in range(9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read_metrics(folder: pathlib.Path) -> None:
    from clip_jax.common import metrics

    for row in metrics.read_history(folder):
        assert row.get("step", 0) is not None


def _make_run(folder: pathlib.Path) -> None:
    import made_runs

    made_runs.weekend(folder)


def _read_run(folder: pathlib.Path) -> None:
    from clip_jax.status import export, run, text
    from clip_jax.status.look import Look

    found = run.look(str(folder))
    if found.error is not None:
        raise found.error
    for look in Look(100, colour=True, unicode=True), Look(60, colour=False, unicode=False):
        look.shown(text.one(found, look) + text.several([found, found], look)).encode()
    json.dumps(export.to_plain(found), allow_nan=False)


def _make_store(form: str) -> Callable[[pathlib.Path], None]:
    def make(folder: pathlib.Path) -> None:
        from clip_jax.embed import store
        from clip_jax.embed.reader import Row

        manifest = store.Manifest({}, 5, {"image_embed": 4}, "float16", form, 3, "tiny", "0" * 8)
        made = store.Store(folder, manifest)
        made.begin()
        for part in range(manifest.parts):
            first, end = made.range(part)
            rows = [
                Row(**{n: i if kind is int else kind() for n, kind in Row.__annotations__.items()})
                for i in range(first, end)
            ]
            made.write(part, rows, {"image_embed": np.ones((len(rows), 4), np.float16)}, {})
        made.finish()

    return make


def _read_store(folder: pathlib.Path) -> None:
    from clip_jax.embed import store

    opened = store.open_store(folder)
    if "image_embed" not in opened.manifest.columns:
        return
    assert sum(len(block) for block in opened.blocks("image_embed")) < 10**6
    opened.table()
    opened.rows([0, 3])


def _make_results(folder: pathlib.Path) -> None:
    from clip_jax.evaluate import results

    scores = (results.Score("zeroshot", "digits", "ensemble", "accuracy", 0.5, 0.4, 0.6, 10, 0.1),)
    found = results.Result("zeroshot", "digits", "Digits", "x", "y", scores, {"a": 1}, 1.0)
    results.Folder(folder).write(found)


def _read_results(folder: pathlib.Path) -> None:
    from clip_jax.evaluate import results

    results.Folder(folder).read("zeroshot", "digits", "y")


TARGETS = {
    "images": Target(_make_images, _read_images),
    "tar": Target(_make_tar, _source(type="tar", path="train/0.tar")),
    "tar labels": Target(_make_tar, _source(type="tar", path="train/*.tar", label_key="npy")),
    "tar classes": Target(_make_tar, _source(type="tar", path="train/*.tar", label_key="label")),
    "index": Target(_make_index, _source(type="tar", path="train/0.tar")),
    **{
        suffix: Target(_make_table(suffix), _source(type="folder", path="", label_key="label"))
        for suffix in ("csv", "tsv", "jsonl")
    },
    "parquet": Target(_make_parquet, _source(type="folder", path="", label_key="label")),
    "folder": Target(_make_folder, _source(type="folder", path="", label_key="label")),
    "tfrecord": Target(_make_records, _source(type="tfrecord", path="*.tfrecord")),
    "clip_jax": Target(_make_weights("vit", "clip_jax"), _read_weights()),
    "transformers": Target(_make_weights("vit", "transformers"), _read_weights()),
    "siglip": Target(_make_weights("siglip", "transformers"), _read_weights()),
    "open_clip": Target(_make_weights("gelu", "open_clip"), _read_weights()),
    "openai": Target(_make_weights("resnet", "openai"), _read_weights("model.pt")),
    "big_vision": Target(_make_weights("siglip", "big_vision"), _read_weights("model.npz")),
    "metrics": Target(_make_metrics, _read_metrics),
    "run": Target(_make_run, _read_run),
    "parquet store": Target(_make_store("parquet"), _read_store),
    "npy store": Target(_make_store("npy"), _read_store),
    "results": Target(_make_results, _read_results),
}

# Those that need no TensorFlow, which takes seconds to load.
QUICK = [name for name in TARGETS if name != "tfrecord"]


# ---- Damage ------------------------------------------------------------------------------------


def damage(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    """Damages the contents of a file, once to three times."""
    for _ in range(rng.integers(1, 4)):
        data = _WAYS[rng.integers(len(_WAYS))](data, rng, others)
    return data


def _place(data: bytes, rng: np.random.Generator) -> int:
    """Draws a byte; often among the first or last, where headers are."""
    size = max(1, len(data))
    near = int(rng.integers(min(size, 512)))
    return [near, size - 1 - near, int(rng.integers(size))][rng.integers(3)]


def _flip(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    found = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        if found:
            found[_place(data, rng)] ^= 1 << int(rng.integers(8))
    return bytes(found)


def _cut(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    return data[: _place(data, rng)]


def _remove(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    place = _place(data, rng)
    return data[:place] + data[place + int(rng.integers(1, 600)) :]


def _repeat(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    first, end = sorted(_place(data, rng) for _ in range(2))
    return data[:end] + data[first:end] * int(rng.integers(1, 5)) + data[end:]


def _splice(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    other = others[rng.integers(len(others))]
    return data[: _place(data, rng)] + other[_place(other, rng) :]


def _number(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    """Writes an extreme number over some bytes, as a length field may have."""
    size = int(rng.choice([1, 2, 4, 8]))
    value = int(rng.choice([0, 1, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62]))
    order = "little" if rng.random() < 0.5 else "big"
    place = _place(data, rng)
    new = (value % 2 ** (8 * size)).to_bytes(size, order)
    return data[:place] + new + data[place + size :]


_TEXTS = [b"\0", b"\xff\xfe", b"\xe2\x80\xa8", b"../../x", b"-1", b"1e999", b"NaN", b"null", b"[]"]
_TEXTS += [b"{}", b'"', b"[" * 3000, b"9" * 400, b"\n", b",", b"true", b"0.5", b"99999999999999"]


def _text(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    """Puts an odd text in place of a number or word, or somewhere."""
    new = _TEXTS[rng.integers(len(_TEXTS))]
    place = _place(data, rng)
    end = place
    while end < len(data) and data[end : end + 1].isalnum():
        end += 1
    return data[:place] + new + data[end:]


def _value(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    """Replaces a value of a JSON file."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return _text(data, rng, others)
    values = [None, -1, 0, 1.5, 2**63, "", "x", [], {}, True, [[1]], "../../x", "a" * 5000]
    at = record
    while isinstance(at, (dict, list)) and at:
        place = int(rng.integers(len(at)))
        key = list(at)[place] if isinstance(at, dict) else place
        if not isinstance(at[key], (dict, list)) or not at[key] or rng.random() < 0.3:
            if isinstance(at, dict) and rng.random() < 0.3:
                del at[key]
            else:
                at[key] = values[rng.integers(len(values))]
            break
        at = at[key]
    return json.dumps(record).encode()


_WAYS = [_flip, _cut, _remove, _repeat, _splice, _number, _text, _value]


# ---- Cases -------------------------------------------------------------------------------------


class _bad_examples:
    """Lets a BadExample pass, as the pipeline does."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> bool:
        from clip_jax.errors import BadExample

        return isinstance(error, BadExample)


def _peak() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def run_case(name: str, seeds: pathlib.Path, seed: int, number: int, where: pathlib.Path) -> str:
    """Runs a case; returns what was found, "" for nothing."""
    from clip_jax.errors import UserError

    target = TARGETS[name]
    rng = np.random.default_rng([seed, number, len(name)])
    folder = where / "case"
    shutil.copytree(seeds, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    chosen = files[rng.integers(len(files))]
    stat = chosen.stat()
    chosen.write_bytes(damage(chosen.read_bytes(), rng, [path.read_bytes() for path in files[:20]]))
    os.utime(chosen, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    memory, begun, problems = _peak(), time.process_time(), []
    with warnings.catch_warnings(record=True) as warned:
        warnings.filterwarnings("always", module=r"clip_jax|numpy")
        try:
            target.read(folder)
        except UserError as error:
            if not str(error).strip():
                problems.append("an error without a text")
        except BaseException:
            problems.append(traceback.format_exc())
    problems += [f"warning: {each.message}" for each in warned[:3]]
    if (seconds := time.process_time() - begun) > SECONDS:
        problems.append(f"{seconds:.0f} s")
    if (grown := _peak() - memory) > MEBIBYTES:
        problems.append(f"{grown} MiB")
    if beside := [path.name for path in where.iterdir() if path.name != "case"]:
        problems.append(f"written beside the folder: {beside}")
    shutil.rmtree(folder)
    return "\n".join([f"{chosen.relative_to(folder)}:", *problems]) if problems else ""


def run(names: list[str], seed: int, first: int, cases: int) -> int:
    """Runs cases in turn over the targets; prints each number before, and the findings."""
    import logging

    logging.disable()
    findings = 0
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        for name in names:
            (root / "seeds" / name).mkdir(parents=True)
            TARGETS[name].make(root / "seeds" / name)
        for number in range(first, first + cases):
            name = names[number % len(names)]
            print(f"case {number} {name}", flush=True)
            where = root / "cases" / str(number)
            where.mkdir(parents=True)
            if found := run_case(name, root / "seeds" / name, seed, number, where):
                findings += 1
                print(f"FOUND by case {number} ({name}): {found}", flush=True)
            shutil.rmtree(where)
    return findings


def supervise(names: list[str], seed: int, first: int, cases: int) -> list[str]:
    """Runs cases in another process, again after each crash; returns the findings."""
    findings, end = [], first + cases
    while first < end:
        command = [sys.executable, __file__, "--inside", f"--seed={seed}", f"--first={first}"]
        command += [f"--cases={end - first}", "--only", *names]
        ran = subprocess.run(command, capture_output=True, text=True, errors="replace")
        parts = ("\n" + ran.stdout).split("\ncase ")
        findings += [part.partition("\n")[2] for part in parts if "FOUND by" in part]
        if ran.returncode == 0:
            break
        if len(parts) < 2:
            raise RuntimeError(f"No case began:\n{ran.stdout}{ran.stderr}")
        crashed = parts[-1].split("\n")[0]
        findings.append(f"FOUND by case {crashed}: exit {ran.returncode}\n{ran.stderr[-2000:]}")
        first = int(crashed.split()[0]) + 1
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    arguments = options.only, options.seed, options.first, options.cases
    if options.inside:
        run(*arguments)
        return
    findings = supervise(*arguments)
    print("\n\n".join(findings))
    print(f"{options.cases} cases of seed {options.seed}: {len(findings)} findings")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
