"""Shards and folders written by hand, for tests."""

import io
import json
import tarfile

from PIL import Image

from clip_jax.configs import default
from clip_jax.data.sources import base, opening


def open_source(**spec) -> base.Source:
    return opening.create(default.source(**spec), image_size=16, seed=0)


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, members: list[tuple[str, bytes]], **options) -> None:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample(key: str, caption: str, shade: int = 0) -> list[tuple[str, bytes]]:
    record = json.dumps({"caption": caption, "alt": f"{caption}!", "kind": caption[0]})
    return [
        (f"{key}.png", picture(shade)),
        (f"{key}.txt", caption.encode()),
        (f"{key}.json", record.encode()),
    ]


def contents(source: base.Source) -> list[tuple[str, str]]:
    examples = [source[i] for i in range(len(source))]
    return [(example.key, example.text) for example in examples]
