"""Folders of images: captions in a table or in files beside the images, or classes by folder."""

import csv
import functools
import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

from etils import epath

from clip_jax.data.sources import captions
from clip_jax.data.sources.base import IMAGE_SUFFIXES, Example
from clip_jax.data.sources.captions import Captions
from clip_jax.data.sources.labels import Labels, group, number_labels, number_names, parse_groups
from clip_jax.errors import BadExample, UserError
from clip_jax.storage import faults, locations, ranges

_TABLE_SUFFIXES = ("csv", "tsv", "jsonl", "parquet")
TABLES = tuple(
    f"{stem}.{suffix}" for stem in ("captions", "metadata") for suffix in _TABLE_SUFFIXES
)
IMAGE_COLUMNS = ("image", "filepath", "file_name", "filename", "path", "file", "img")
TEXT_COLUMNS = ("caption", "text", "title")


class ImageFolder:
    """The images of a directory, with their captions or classes.

    The first of these that is found decides:
    1. A table (one of `TABLES`, or the one that is named), with a column of paths relative to the
       directory (one of `IMAGE_COLUMNS`) and one of captions (one of `TEXT_COLUMNS`, or
       `text_key`), which may be missing where there are classes.
    2. KEY.txt or KEY.json beside KEY.jpg, at any depth.
    3. Images in sub-folders only: the name of the folder is the class, and the caption is
       "a photo of a NAME.".

    Attributes:
      problems: number of images left out for lack of a caption, by reason.
      labels: of every example; None: it has no classes.
      class_names: of the labels.
      templates: none.
    """

    templates: tuple[str, ...] = ()

    def __init__(
        self,
        path: str,
        text_key: str,
        label_key: str,
        group_keys: str = "",
        *,
        by_image: bool = False,
    ):
        """Lists the directory; reads the table, and with `label_key` every .json file.

        Args:
          path: the directory, or a table in it; local or gs://.
          text_key: columns of the table, or fields of the .json files, with captions, as
            `captions.parse_fields` has them; "": the usual names.
          label_key: column or field with the class; "": none. A cell of a table may hold several,
            with ";" between them, a field a list.
          group_keys: columns or fields with the groups of an example, comma-separated.
          by_image: whether rows of a table with the same image are one example, with the captions
            of all of them; what else it has stands in the first.

        Raises:
          UserError: nothing of what is looked for is found.
        """
        self._root = locations.reachable(path)
        self._fields = captions.parse_fields(text_key)
        self._group_keys = parse_groups(group_keys)
        self.problems: Counter[str] = Counter()
        self._images: list[str] = []  # relative to the root
        # By row, what the fields hold; None: it stands in files beside the images.
        self._texts: list[list[tuple[Any, float]]] | None = None
        self._groups: list[tuple[str, ...]] | None = None
        self.labels: Labels | None = None
        self.class_names: tuple[str, ...] = ()
        table = None
        if self._root.suffix[1:] in _TABLE_SUFFIXES and self._root.exists():
            self._root, table = self._root.parent, self._root
        elif not path or not self._root.is_dir():
            raise UserError(f"There is no directory source.path = {path!r}.")
        else:
            tables = (self._root / name for name in TABLES)
            table = next((table for table in tables if table.exists()), None)
        if table is not None:
            self._use_table(table, label_key, by_image)
        else:
            self._use_tree(label_key)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        return self.start([index])[0]()

    def start(self, indices: Sequence[int]) -> list[Callable[[], Example]]:
        """Begins to read images, as `reading.start` does; what lies beside them comes later."""
        reads = [ranges.start_whole(self._root / self._images[index]) for index in indices]
        return [functools.partial(self._example, *each) for each in zip(indices, reads)]

    def _example(self, index: int, begun: Callable[[], bytes]) -> Example:
        key = self._images[index]
        image = self._read(key, begun)
        if image is None:
            raise BadExample("missing image", key)
        return Example(
            image=image,
            captions=self._captions(index),
            labels=() if self.labels is None else self.labels[index],
            key=key,
            groups=self._groups_of(index) if self._group_keys else (),
        )

    def _use_table(self, path: epath.Path, label_key: str, by_image: bool) -> None:
        rows = read_table(path)
        if not rows:
            raise UserError(f"The table {path} has no rows.")
        columns = tuple(rows[0])
        image_column = _pick(columns, IMAGE_COLUMNS, path, "image paths")
        fields = self._text_columns(columns, path, optional=bool(label_key))
        self._texts = [[(row[name], weight) for name, weight in fields] for row in rows]
        if by_image:
            rows = self._merge(rows, image_column)
        self._images = [str(row[image_column]) for row in rows]
        if label_key:
            _pick(columns, (label_key,), path, "classes (source.label_key)")
            cells = [_cell(row[label_key]) for row in rows]
            self.labels, self.class_names = number_labels(cells)
        for key in self._group_keys:
            _pick(columns, (key,), path, "groups (source.group_keys)")
        if self._group_keys:
            self._groups = [tuple(group(row[key]) for key in self._group_keys) for row in rows]

    def _merge(self, rows: list[dict[str, Any]], image_column: str) -> list[dict[str, Any]]:
        """The first row of each image; gathers the texts of all its rows."""
        assert self._texts is not None
        merged: dict[str, tuple[dict[str, Any], list[tuple[Any, float]]]] = {}
        for row, texts in zip(rows, self._texts):
            merged.setdefault(str(row[image_column]), (row, []))[1].extend(texts)
        self._texts = [texts for _, texts in merged.values()]
        return [row for row, _ in merged.values()]

    def _text_columns(
        self, columns: tuple[str, ...], path: epath.Path, optional: bool
    ) -> Iterable[captions.Field]:
        what = "captions (set source.text_key)"
        if not self._fields and optional and not set(TEXT_COLUMNS) & set(columns):
            return ()
        if not self._fields:
            return (captions.Field(_pick(columns, TEXT_COLUMNS, path, what), 1.0),)
        for field in self._fields:
            _pick(columns, (field.name,), path, what)
        return self._fields

    def _use_tree(self, label_key: str) -> None:
        found = _list(self._root)
        pictures = [name for name in found if _suffix(name) in IMAGE_SUFFIXES]
        kinds = [kind for kind in ("txt", "json") if self._wants(kind)]
        captioned = {_stem(name) for name in found if _suffix(name) in kinds}
        self._images = [name for name in pictures if _stem(name) in captioned]
        if self._images:
            if missing := len(pictures) - len(self._images):
                self.problems["no caption"] = missing
                logging.warning("%d images of %s have no caption", missing, self._root)
            if label_key:
                labels = [self._label_beside(name, label_key) for name in self._images]
                self.labels, self.class_names = number_labels(labels)
        elif pictures and all("/" in name for name in pictures) and not self._fields:
            self._images = pictures
            folders = [name.rpartition("/")[0] for name in pictures]
            self.labels, self.class_names = number_names([[folder] for folder in folders])
            texts = [f"a photo of a {name.replace('_', ' ')}." for name in folders]
            self._texts = [[(text, 1.0)] for text in texts]
        else:
            raise UserError(self._not_found(len(pictures)))

    def _not_found(self, count: int) -> str:
        return (
            f"The directory source.path = {str(self._root)!r} has {count} images and no captions. "
            f"Looked for: a table named {', '.join(TABLES)} with columns such as image,caption; "
            "KEY.txt or KEY.json beside each KEY.jpg, .png or .webp; or images in sub-folders "
            "named by class."
        )

    def _captions(self, index: int) -> Captions:
        key, optional = self._images[index], self.labels is not None
        if self._texts is not None:
            return captions.collect(self._texts[index], key, not optional)
        txt = self._read(f"{_stem(key)}.txt") if self._wants("txt") else None
        needs_json = txt is None if not self._fields else self._wants("json")
        record = self._read(f"{_stem(key)}.json") if needs_json else None
        return captions.read_files(txt, record, self._fields, key, not optional)

    def _groups_of(self, index: int) -> tuple[str, ...]:
        if self._groups is not None:
            return self._groups[index]
        key = self._images[index]
        record = self._read(f"{_stem(key)}.json")
        return tuple(group(captions.read_field(record, name, key)) for name in self._group_keys)

    def _wants(self, kind: str) -> bool:
        """Whether captions may stand in files of this kind."""
        kinds = {"txt" if field.name == "txt" else "json" for field in self._fields}
        return not kinds or kind in kinds

    def _label_beside(self, key: str, label_key: str) -> Any:
        try:
            return captions.read_field(self._read(f"{_stem(key)}.json"), label_key, key)
        except BadExample:
            return None

    def _read(self, name: str, begun: Callable[[], bytes] | None = None) -> bytes | None:
        """Contents of a file, None: there is none; `begun` is a first try."""
        first = [begun] if begun else []

        def read() -> bytes | None:
            try:
                return (first.pop() if first else ranges.start_whole(self._root / name))()
            except (FileNotFoundError, IsADirectoryError):
                return None

        try:
            return faults.briefly(read)
        except OSError as error:
            raise BadExample("unreadable file", name, str(error)) from None


def read_table(path: epath.Path) -> list[dict[str, Any]]:
    """Rows of a .csv, .tsv, .jsonl or .parquet file; UserError where it cannot be read."""
    data = ranges.read(path)
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
        text = data.decode("utf-8-sig")
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


def _cell(value: Any) -> Any:
    """What a cell holds as classes: "cat;dog" are two, "" is none."""
    if not isinstance(value, str):
        return value
    return [name for name in (part.strip() for part in value.split(";")) if name]


def _list(root: epath.Path) -> list[str]:
    """All files under the root, relative to it, sorted; without hidden ones."""
    found = locations.tree(root)
    return [name for name in found if not any(p.startswith(".") for p in name.split("/"))]


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix[1:].lower()


def _stem(name: str) -> str:
    return name.rpartition(".")[0]
