"""Tar shards as img2dataset and webdataset write them: KEY.jpg beside KEY.txt or KEY.json."""

import logging
import time
from array import array
from collections import Counter
from typing import IO, Any

import numpy as np
from etils import epath

from clip_jax.data import files
from clip_jax.data.sources import Example, number_labels, read_caption, read_field
from clip_jax.data.tar_index import BLOCK, Sample, Span, samples
from clip_jax.errors import BadExample, UserError

MISSING_FOR = 60.0  # seconds until a missing shard is tried again


class _Columns:
    """The index while it grows: a few bytes per sample, where objects would take hundreds."""

    def __init__(self) -> None:
        self.number = array("i")  # of the shard
        self.offsets = array("q")  # of image and caption
        self.sizes = array("i")  # of image and caption
        self.in_json = array("b")  # whether the caption is a field of the .json file
        self.labels: list[Any] = []  # as found; only with label_key


class TarShards:
    """Random access to the samples of tar shards, through an index made at the start.

    The index takes 33 bytes per sample, 4 more with labels. A shard is opened for each read, so
    there may be more shards than a process may have files open.

    Attributes:
      problems: number of damaged shards, and of samples left out for lack of a file, by reason.
      class_names: of the labels, where `label_key` names a field of text.
      templates: none.
    """

    templates: tuple[str, ...] = ()

    def __init__(self, paths: str, text_key: str, label_key: str):
        """Reads every header of every shard; with `label_key` also every .json file.

        Args:
          paths: files, directories, patterns and brace ranges, comma-separated; local or gs://.
          text_key: field of the .json file with the caption; "": the .txt file, or else
            "caption" of the .json file.
          label_key: field of the .json file with the class; "": no classes.

        Raises:
          UserError: no shards, or no usable sample in them.
        """
        self._text_key = text_key
        self._label_key = label_key
        self._shards = _find(paths)
        self._missing_until: dict[int, float] = {}
        self.problems: Counter[str] = Counter()
        columns = _Columns()
        for number, path in enumerate(self._shards):
            self._scan(number, path, columns)
        self._number = np.frombuffer(columns.number, np.int32)
        self._offsets = np.frombuffer(columns.offsets, np.int64).reshape(-1, 2)
        self._sizes = np.frombuffer(columns.sizes, np.int32).reshape(-1, 2)
        self._in_json = np.frombuffer(columns.in_json, np.int8)
        if not len(self):
            raise UserError(
                f"No usable sample in the {len(self._shards)} shard(s) of source.path = {paths!r}"
                f" ({dict(self.problems) or 'they are empty'}). A sample is KEY.jpg, .png or .webp"
                " beside KEY.txt, or beside KEY.json with the caption under source.text_key."
            )
        self._labels, self.class_names = number_labels(columns.labels) if label_key else (None, ())

    def __len__(self) -> int:
        return len(self._number)

    def __getitem__(self, index: int) -> Example:
        image, text = (Span(*map(int, s)) for s in zip(self._offsets[index], self._sizes[index]))
        key, image_bytes, text_bytes = self._read(int(self._number[index]), image, text)
        txt, record = (None, text_bytes) if self._in_json[index] else (text_bytes, None)
        return Example(
            image=image_bytes,
            text=read_caption(txt, record, self._text_key, key),
            label=-1 if self._labels is None else int(self._labels[index]),
            key=key,
        )

    def _scan(self, number: int, path: epath.Path, columns: _Columns) -> None:
        """Adds the usable samples of one shard to the index and counts what is wrong."""
        try:
            with path.open("rb") as file:
                found, damage = samples(file)
                for position, sample in enumerate(found):
                    problem = self._problem(sample)
                    if not problem:
                        self._append(columns, number, sample)
                        if self._label_key:
                            columns.labels.append(_label(file, sample, self._label_key))
                    # The last sample of a cut shard may have lost a file: no fault of its own.
                    elif not (damage and position == len(found) - 1):
                        self.problems[problem] += 1
        except FileNotFoundError:
            damage = "there is no such file"
        except OSError as error:
            damage = str(error)
        if damage:
            self.problems["damaged shard"] += 1
            logging.warning("Damaged shard %s, its whole samples are used: %s", path, damage)

    def _problem(self, sample: Sample) -> str:
        if "image" not in sample:
            return "no image"
        if "json" not in sample and (self._text_key or "txt" not in sample):
            return "no caption"
        return ""

    def _append(self, columns: _Columns, number: int, sample: Sample) -> None:
        in_json = bool(self._text_key) or "txt" not in sample
        image, text = sample["image"], sample["json" if in_json else "txt"]
        columns.number.append(number)
        columns.offsets.extend((image.offset, text.offset))
        columns.sizes.extend((image.size, text.size))
        columns.in_json.append(in_json)

    def _read(self, number: int, image: Span, text: Span) -> tuple[str, bytes, bytes]:
        """Key of a sample and contents of its two files; retries, then BadExample."""
        path = self._shards[number]

        def read() -> tuple[str, bytes, bytes]:
            with path.open("rb") as file:
                return _read_sample(file, path.name, image, text)

        known_missing = time.monotonic() < self._missing_until.get(number, 0)
        try:
            return files.with_retries(read, () if known_missing else files.RETRY_DELAYS)
        except BadExample:
            raise
        except Exception as error:
            self._missing_until[number] = time.monotonic() + MISSING_FOR
            raise BadExample(
                "missing shard", f"{path} at byte {image.offset}", str(error)
            ) from None


def _find(paths: str) -> list[epath.Path]:
    shards = files.expand(paths, ".tar")
    if not shards:
        raise UserError(
            f"No tar shards match source.path = {paths!r}. It takes files, directories and "
            'patterns, comma-separated, such as --config.data.source.path="DIR/*.tar" or '
            '"gs://BUCKET/{00000..00099}.tar".'
        )
    return shards


def _read_sample(file: IO[bytes], shard: str, image: Span, text: Span) -> tuple[str, bytes, bytes]:
    # The name is not worth memory in the index: it stands in the header before the contents.
    file.seek(image.offset - BLOCK)
    header, image_bytes = file.read(BLOCK), file.read(image.size)
    file.seek(text.offset)
    text_bytes = file.read(text.size)
    name = header[:100].split(b"\0")[0].decode("utf-8", "replace")
    key = f"{shard}/{name.rpartition('.')[0]}"
    if len(image_bytes) < image.size or len(text_bytes) < text.size:
        raise BadExample("truncated shard", key)
    return key, image_bytes, text_bytes


def _label(file: IO[bytes], sample: Sample, label_key: str) -> Any:
    """The class of a sample; None where it has no readable one."""
    if "json" not in sample:
        return None
    file.seek(sample["json"].offset)
    try:
        return read_field(file.read(sample["json"].size), label_key, "")
    except BadExample:
        return None
