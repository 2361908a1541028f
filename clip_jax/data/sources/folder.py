"""Folders of images, with captions in a table or beside the images, or with classes by folder."""

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from etils import epath

from clip_jax.data.sources import captions, parquet_images, tables
from clip_jax.data.sources.base import IMAGE_SUFFIXES, Example, Request, as_key
from clip_jax.data.sources.captions import Captions
from clip_jax.data.sources.labels import (
    GROUP_SETTINGS,
    Labels,
    group,
    number_labels,
    number_names,
    parse_groups,
)
from clip_jax.data.sources.parquet_images import StoredImage, StoredImages
from clip_jax.data.sources.tables import IMAGE_COLUMNS, TEXT_COLUMNS
from clip_jax.errors import BadExample, UserError
from clip_jax.storage import faults, locations, ranges

TABLES = tuple(f"{stem}{suffix}" for stem in ("captions", "metadata") for suffix in tables.SUFFIXES)


def open_source(request: Request) -> "ImageFolder":
    """Opens a source of type "folder"."""
    spec = request.spec
    return ImageFolder(
        spec.path,
        spec.text_key,
        spec.label_key,
        spec.group_keys,
        image_key=spec.image_key,
        chunk=request.chunk,
        cached_chunks=request.cached_chunks,
    )


class ImageFolder:
    """The images of a directory, with their captions or classes.

    The first layout found is used:
    1. A table (one of `TABLES`, or the one named) with a column of images (one of `IMAGE_COLUMNS`,
       or `image_key`) and a column of captions (one of `TEXT_COLUMNS`, or `text_key`). The captions
       may be missing if there are classes. Images are paths relative to the directory. In .parquet
       files they may also be bytes, or structs of bytes and path as on the Hugging Face hub, and
       there may be several such files.
    2. .parquet files of any name that hold images, in the directory or in its sub-directory data.
    3. KEY.txt or KEY.json beside KEY.jpg, at any depth.
    4. Images in sub-folders only. The folder's name is the class, and the caption is
       "a photo of a NAME.".

    Attributes:
      problems: number of images left out for lack of a caption, by reason.
      labels: class ids of every example; None: there are no classes.
      class_names: class names, by id.
      templates: empty; a folder has no prompt templates.
    """

    templates: tuple[str, ...] = ()

    def __init__(
        self,
        path: str,
        text_key: str,
        label_key: str,
        group_keys: str = "",
        *,
        image_key: str = "",
        by_image: bool = False,
        chunk: int = 1,
        cached_chunks: int = 0,
    ):
        """Lists the directory and reads the table, or with `label_key` every .json file.

        Args:
          path: the directory, a table in it, or .parquet files (see `locations.expand`); local,
            gs:// or s3://.
          text_key: columns of the table or fields of the .json files that hold captions (see
            `captions.parse_fields`); "": the usual names.
          label_key: column or field of the class; "": none. Several classes are separated by ";"
            in a cell, and a list in a field.
          group_keys: columns or fields of the groups of an example, comma-separated.
          image_key: column of the table that holds the images; "": the usual names.
          by_image: whether rows of a table with the same image are one example, with the captions
            of all rows and the other columns of the first row.
          chunk: images of .parquet files that are read together.
          cached_chunks: chunks held in memory; 0: the row groups read last.

        Raises:
          UserError: the directory has none of these layouts.
        """
        self._fields = captions.parse_fields(text_key)
        self._group_keys = parse_groups(group_keys)
        self.problems: Counter[str] = Counter()
        self._images: list[str] = []  # paths relative to the root, or keys of stored images
        self._stored: StoredImages | None = None  # images held in the table itself
        self._bad_rows: dict[int, str] = {}  # reason by example
        # Values of the caption fields by example; None: they are in files beside the images.
        self._texts: _Texts | list[list[tuple[Any, float]]] | None = None
        # Columns of the groups, and the row of each example; None: they are in files too.
        self._groups: tuple[Sequence[tables.Column], Sequence[int]] | None = None
        self.labels: Labels | None = None
        self.class_names: tuple[str, ...] = ()
        self._root, found = _find(path, image_key)
        self._tables = found
        if found:
            self._use_table(found, image_key, label_key, by_image, chunk, cached_chunks)
        else:
            self._use_tree(label_key)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        return self.start([index])[0]()

    def listing(self) -> Iterator[str]:
        """Lists the tables and the images beside them, as `Source` says."""
        for path, stat in zip(self._tables, locations.stats(self._tables)):
            yield f"{path.name}\t{stat.size if stat else 0} bytes"
        if self._stored is None:
            yield from self._images

    def start(self, indices: Sequence[int]) -> list[Callable[[], Example]]:
        """Begins to read images, as `reading.start` does; files beside them are read later."""
        if self._stored is not None:
            reads = self._stored.start(indices)
            images = [functools.partial(self._stored_image, *each) for each in zip(indices, reads)]
        else:
            images = [self._start_file(index) for index in indices]
        return [functools.partial(self._example, *each) for each in zip(indices, images)]

    def _example(self, index: int, read: Callable[[], bytes]) -> Example:
        key = self._images[index]
        return Example(
            image=read(),
            captions=self._captions(index),
            labels=() if self.labels is None else self.labels[index],
            key=as_key(key) if self._stored is None else key,
            groups=self._groups_of(index) if self._group_keys else (),
        )

    def _start_file(self, index: int) -> Callable[[], bytes]:
        """Begins to read the file of an image."""
        key = self._images[index]
        if index in self._bad_rows:
            return functools.partial(_fail, self._bad_rows[index], key)
        begun = ranges.start_whole(self._root / key)

        def read() -> bytes:
            image = self._read(key, begun)
            if image is None:
                raise BadExample("missing image", key)
            return image

        return read

    def _stored_image(self, index: int, read: Callable[[], StoredImage]) -> bytes:
        key = self._images[index]
        if index in self._bad_rows:
            raise BadExample(self._bad_rows[index], key)
        found = read()
        if found.data:
            return found.data
        image = self._read(found.path) if found.path else None
        if image is None:
            raise BadExample("missing image" if found.path else "no image", key)
        return image

    def _use_table(
        self,
        paths: Sequence[epath.Path],
        image_key: str,
        label_key: str,
        by_image: bool,
        chunk: int,
        cached_chunks: int,
    ) -> None:
        footers, image_column = [], ""
        if paths[0].suffix == ".parquet":
            footers = parquet_images.read_footers(paths)
            image_column = _image_column(footers[0].schema.names, image_key, paths[0])
            if parquet_images.holds_images(footers, image_column):
                self._stored = StoredImages(
                    footers, image_column, chunk=chunk, cached_chunks=cached_chunks
                )
        fields: list[captions.Field] = []

        def choose(names: Sequence[str], path: epath.Path) -> list[str]:
            nonlocal image_column
            image_column = _image_column(names, image_key, path)
            fields[:] = self._text_columns(names, path, optional=bool(label_key))
            if label_key:
                tables.pick(names, [label_key], path, "classes (source.label_key)")
            for key in self._group_keys:
                tables.pick(names, [key], path, f"groups (source.{GROUP_SETTINGS})")
            others = [field.name for field in fields] + [label_key, *self._group_keys]
            images = [] if self._stored else [image_column]
            return [name for name in images + others if name]

        table = tables.load(paths, choose)
        if not len(table):
            raise UserError(f"The table {paths[0]} has no rows.")
        rows: Sequence[int] = range(len(table))
        if self._stored is None:
            self._images = self._paths(table, image_column)
            if by_image:
                rows = self._merge(table, fields)
        else:
            self._images = [table.key(row) for row in rows]
            self._bad_rows = dict(table.problems)
        if self._texts is None:
            self._texts = _Texts(table, fields)
        if label_key:
            cells = list(table.columns[label_key])
            self.labels, self.class_names = number_labels([_cell(cells[row]) for row in rows])
            if footers:
                self._name_classes(
                    parquet_images.class_names(footers[0].schema, label_key), label_key
                )
        if self._group_keys:
            self._groups = [table.columns[key] for key in self._group_keys], rows

    def _paths(self, table: tables.Table, image_column: str) -> list[str]:
        """Returns the image of every row; records the rows that have none."""
        found = [tables.path_of(value) for value in table.columns[image_column]]
        for row, path in enumerate(found):
            if not path:
                self._bad_rows[row] = table.problems.get(row, "no image")
        return [path or table.key(row) for row, path in enumerate(found)]

    def _merge(self, table: tables.Table, fields: Sequence[captions.Field]) -> list[int]:
        """Returns the first row of each image; collects the texts of all its rows."""
        texts = _Texts(table, fields)
        merged: dict[str, tuple[int, list[tuple[Any, float]]]] = {}
        for row, image in enumerate(self._images):
            merged.setdefault(image, (row, []))[1].extend(texts[row])
        rows = [row for row, _ in merged.values()]
        self._texts = [texts for _, texts in merged.values()]
        self._images = list(merged)
        self._bad_rows = {
            i: self._bad_rows[row] for i, row in enumerate(rows) if row in self._bad_rows
        }
        return rows

    def _name_classes(self, names: tuple[str, ...], label_key: str) -> None:
        """Uses the names that a .parquet file has for the classes it numbers."""
        assert self.labels is not None
        if not names or self.class_names:
            return
        if self.labels.largest >= len(names):
            raise UserError(
                f"The column {label_key!r} has class {self.labels.largest}, but its file names "
                f"only {len(names)} classes."
            )
        self.class_names = names

    def _text_columns(
        self, columns: Sequence[str], path: epath.Path, optional: bool
    ) -> Iterable[captions.Field]:
        what = "captions (set source.text_key)"
        if not self._fields and optional and not set(TEXT_COLUMNS) & set(columns):
            return ()
        if not self._fields:
            return (captions.Field(tables.pick(columns, TEXT_COLUMNS, path, what), 1.0),)
        for field in self._fields:
            tables.pick(columns, [field.name], path, what)
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
            ".parquet files with images in a column such as image (source.image_key); "
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

    def _groups_of(self, index: int) -> tuple[Any, ...]:
        if self._groups is not None:
            columns, rows = self._groups
            return tuple(group(column[rows[index]]) for column in columns)
        key = self._images[index]
        record = self._read(f"{_stem(key)}.json")
        return tuple(group(captions.read_field(record, name, key)) for name in self._group_keys)

    def _wants(self, kind: str) -> bool:
        """Returns whether files of this kind may hold captions."""
        kinds = {"txt" if field.name == "txt" else "json" for field in self._fields}
        return not kinds or kind in kinds

    def _label_beside(self, key: str, label_key: str) -> Any:
        try:
            return captions.read_field(self._read(f"{_stem(key)}.json"), label_key, key)
        except BadExample:
            return None

    def _read(self, name: str, begun: Callable[[], bytes] | None = None) -> bytes | None:
        """Returns the contents of a file, None if there is none; `begun` is the first attempt."""
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


class _Texts:
    """The (value, weight) of a table's caption fields, by row."""

    def __init__(self, table: tables.Table, fields: Sequence[captions.Field]):
        self._length = len(table)
        self._columns = [(table.columns[field.name], field.weight) for field in fields]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> list[tuple[Any, float]]:
        return [(column[row], weight) for column, weight in self._columns]


def _find(path: str, image_key: str) -> tuple[epath.Path, list[epath.Path]]:
    """Returns the directory that image paths are relative to, and the tables, if any."""
    root = locations.parse(path) if path else epath.Path()
    if path.endswith(tuple(f"{suffix}.gz" for suffix in tables.SUFFIXES)):
        raise UserError(f"source.path = {path!r} is compressed: decompress it with gunzip first.")
    if path.endswith(".parquet") and not root.is_dir():
        found = locations.expand(path, ".parquet")
        if not found:
            raise UserError(f"No .parquet files match source.path = {path!r}.")
        if other := [str(each) for each in found if each.suffix != ".parquet"]:
            raise UserError(
                f"source.path = {path!r} names {other[0]} beside .parquet files. Several tables "
                "are read together only if all are .parquet files."
            )
        return found[0].parent, found
    root = locations.reachable(path)
    if root.suffix in tables.SUFFIXES and root.exists() and not root.is_dir():
        return root.parent, [root]
    if not path or not root.is_dir():
        raise UserError(
            f"There is no directory source.path = {path!r}: name the directory of the images, or a "
            "table of them."
        )
    for name in TABLES:
        if (root / name).exists():
            return root, [root / name]
    return root, parquet_images.find(root, [image_key] if image_key else IMAGE_COLUMNS)


def _image_column(names: Sequence[str], image_key: str, path: epath.Path) -> str:
    wanted = [image_key] if image_key else IMAGE_COLUMNS
    return tables.pick(names, wanted, path, "images (set source.image_key)")


def _fail(reason: str, key: str) -> bytes:
    raise BadExample(reason, key)


def _cell(value: Any) -> Any:
    """Splits a cell into its classes: "cat;dog" holds two, "" none."""
    if not isinstance(value, str):
        return value
    return [name for name in (part.strip() for part in value.split(";")) if name]


def _list(root: epath.Path) -> list[str]:
    """Returns the files under the root, relative to it and sorted, without hidden ones."""
    found = locations.tree(root)
    return [name for name in found if not any(p.startswith(".") for p in name.split("/"))]


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix[1:].lower()


def _stem(name: str) -> str:
    return name.rpartition(".")[0]
