"""Every reader of files, and sound files for it that the fuzzer damages."""

import io
import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from tiny_data import encoded


class Target(NamedTuple):
    """A reader of files.

    Attributes:
      make: writes sound files into a folder.
      read: reads them; may raise the package's errors.
    """

    make: Callable[[pathlib.Path], None]
    read: Callable[[pathlib.Path], None]


class _bad_examples:
    """Lets a BadExample pass, as the pipeline does."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> bool:
        from clip_jax.errors import BadExample

        return isinstance(error, BadExample)


def _make_images(folder: pathlib.Path) -> None:
    from PIL import Image

    image = Image.effect_noise((40, 24), 60).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    grey16 = Image.fromarray(np.arange(960, dtype=np.uint16).reshape(24, 40) * 68)
    files = {
        "a.jpg": encoded(image, "JPEG", exif=exif),
        "progressive.jpg": encoded(image, "JPEG", progressive=True),
        "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "a.png": encoded(image, "PNG", exif=exif),
        "palette.png": encoded(image.convert("P"), "PNG", transparency=3),
        "grey16.png": encoded(grey16, "PNG"),
        "a.gif": encoded(image.convert("P"), "GIF"),
        "film.gif": encoded(image, "GIF", save_all=True, append_images=[image.rotate(9)]),
        "a.bmp": encoded(image, "BMP"),
        "a.tif": encoded(image, "TIFF"),
        "deflated.tif": encoded(image, "TIFF", compression="tiff_adobe_deflate"),
        "grey16.tif": encoded(grey16, "TIFF"),
        "a.webp": encoded(image, "WEBP"),
        "transparent.webp": encoded(image.convert("RGBA"), "WEBP", lossless=True, exif=exif),
        "a.jp2": encoded(image, "JPEG2000"),
        "a.avif": encoded(image, "AVIF", speed=10),
        "a.ppm": encoded(image, "PPM"),
        "a.eps": encoded(image, "EPS"),
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

    return encoded(Image.new("RGB", (5, 4), (200, 30, 30)), "PNG")


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
