"""Folders of images: captions in a table or in files beside the images, or classes by folder."""

import csv
import io
import json
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from etils import epath

from clip_jax.data import files
from clip_jax.data.sources import (
    IMAGE_SUFFIXES,
    Example,
    number_labels,
    number_names,
    read_caption,
    read_field,
)
from clip_jax.errors import BadExample, UserError

_TABLE_SUFFIXES = ("csv", "tsv", "jsonl", "parquet")
TABLES = tuple(
    f"{stem}.{suffix}" for stem in ("captions", "metadata") for suffix in _TABLE_SUFFIXES
)
IMAGE_COLUMNS = ("image", "filepath", "file_name", "filename", "path")
TEXT_COLUMNS = ("caption", "text", "title")


class ImageFolder:
    """The images of a directory, with their captions or classes.

    The first of these that is found decides:
    1. A table (one of `TABLES`), with a column of paths relative to the directory (one of
       `IMAGE_COLUMNS`) and one of captions (one of `TEXT_COLUMNS`, or `text_key`).
    2. KEY.txt or KEY.json beside KEY.jpg, at any depth.
    3. Images in sub-folders only: the name of the folder is the class, and the caption is
       "a photo of a NAME.".

    Attributes:
      problems: number of images left out for lack of a caption, by reason.
      class_names: of the labels.
      templates: none.
    """

    templates: tuple[str, ...] = ()

    def __init__(self, path: str, text_key: str, label_key: str):
        """Lists the directory; reads the table, and with `label_key` every .json file.

        Args:
          path: the directory, local or gs://.
          text_key: column of the table, or field of the .json files, with the caption; "": the
            usual names.
          label_key: column or field with the class; "": none.

        Raises:
          UserError: nothing of what is looked for is found.
        """
        self._root = epath.Path(path).expanduser()
        self._text_key = text_key
        self.problems: Counter[str] = Counter()
        self._images: list[str] = []  # relative to the root
        self._texts: list[str] | None = None  # None: in files beside the images
        self._labels = None
        self.class_names: tuple[str, ...] = ()
        if not path or not self._root.is_dir():
            raise UserError(f"There is no directory source.path = {path!r}.")
        table = next((self._root / name for name in TABLES if (self._root / name).exists()), None)
        if table is not None:
            self._use_table(table, label_key)
        else:
            self._use_tree(label_key)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        key = self._images[index]
        image = self._read(key)
        if image is None:
            raise BadExample("missing image", key)
        return Example(
            image=image,
            text=self._text_beside(key) if self._texts is None else self._texts[index],
            label=-1 if self._labels is None else int(self._labels[index]),
            key=key,
        )

    def _use_table(self, path: epath.Path, label_key: str) -> None:
        rows = read_table(path)
        if not rows:
            raise UserError(f"The table {path} has no rows.")
        columns = tuple(rows[0])
        image_column = _pick(columns, IMAGE_COLUMNS, path, "image paths")
        wanted = (self._text_key,) if self._text_key else TEXT_COLUMNS
        text_column = _pick(columns, wanted, path, "captions (set source.text_key)")
        self._images = [str(row[image_column]) for row in rows]
        self._texts = [_text(row[text_column]) for row in rows]
        if label_key:
            _pick(columns, (label_key,), path, "classes (source.label_key)")
            self._labels, self.class_names = number_labels([row[label_key] for row in rows])

    def _use_tree(self, label_key: str) -> None:
        found = _list(self._root)
        pictures = [name for name in found if _suffix(name) in IMAGE_SUFFIXES]
        kinds = ("json",) if self._text_key else ("txt", "json")
        captioned = {_stem(name) for name in found if _suffix(name) in kinds}
        self._images = [name for name in pictures if _stem(name) in captioned]
        if self._images:
            if missing := len(pictures) - len(self._images):
                self.problems["no caption"] = missing
                logging.warning("%d images of %s have no caption", missing, self._root)
            if label_key:
                labels = [self._label_beside(name, label_key) for name in self._images]
                self._labels, self.class_names = number_labels(labels)
        elif pictures and all("/" in name for name in pictures) and not self._text_key:
            self._images = pictures
            folders = [name.rpartition("/")[0] for name in pictures]
            self._labels, self.class_names = number_names(folders)
            self._texts = [f"a photo of a {name.replace('_', ' ')}." for name in folders]
        else:
            raise UserError(self._not_found(len(pictures)))

    def _not_found(self, count: int) -> str:
        return (
            f"The directory source.path = {str(self._root)!r} has {count} images and no captions. "
            f"Looked for: a table named {', '.join(TABLES)} with columns such as image,caption; "
            "KEY.txt or KEY.json beside each KEY.jpg, .png or .webp; or images in sub-folders "
            "named by class."
        )

    def _text_beside(self, key: str) -> str:
        txt = record = None
        if not self._text_key:
            txt = self._read(f"{_stem(key)}.txt")
        if txt is None:
            record = self._read(f"{_stem(key)}.json")
        return read_caption(txt, record, self._text_key, key)

    def _label_beside(self, key: str, label_key: str) -> Any:
        try:
            return read_field(self._read(f"{_stem(key)}.json"), label_key, key)
        except BadExample:
            return None

    def _read(self, name: str) -> bytes | None:
        """Contents of a file, None: there is none."""

        def read() -> bytes | None:
            try:
                return (self._root / name).read_bytes()
            except (FileNotFoundError, IsADirectoryError):
                return None

        try:
            return files.with_retries(read, files.RETRY_DELAYS)
        except OSError as error:
            raise BadExample("unreadable file", name, str(error)) from None


def read_table(path: epath.Path) -> list[dict[str, Any]]:
    """Rows of a .csv, .tsv, .jsonl or .parquet file; UserError where it cannot be read."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(io.BytesIO(path.read_bytes())).to_pylist()
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        delimiter = "\t" if path.suffix == ".tsv" else ","
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    except (ValueError, csv.Error) as error:
        raise UserError(f"The table {path} cannot be read: {error}.") from None


def _pick(columns: Iterable[str], wanted: tuple[str, ...], path: epath.Path, what: str) -> str:
    for name in wanted:
        if name in columns:
            return name
    raise UserError(
        f"The table {path} has no column of {what}: looked for {', '.join(wanted)}; its columns "
        f"are {', '.join(map(str, columns))}."
    )


def _text(value: Any) -> str:
    """A cell as caption: the first of several; "" where there is none."""
    if isinstance(value, list):
        value = value[0] if value else None
    return "" if value is None else str(value)


def _list(root: epath.Path) -> list[str]:
    """All files under the root, relative to it, sorted; without hidden ones."""
    found = []
    for folder, _, names in root.walk():
        prefix = folder.relative_to(root).as_posix()
        found += [name if prefix == "." else f"{prefix}/{name}" for name in names]
    return sorted(name for name in found if not any(p.startswith(".") for p in name.split("/")))


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix[1:].lower()


def _stem(name: str) -> str:
    return name.rpartition(".")[0]
