"""The inputs of `embed`: every data set that can be trained on, plain folders, caption files."""

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath

from etils import epath

from clip_jax.data import arguments
from clip_jax.data.sources import captions, folder, parquet_images, tables
from clip_jax.data.sources.base import IMAGE_SUFFIXES, Example, Source, as_key
from clip_jax.errors import BadExample, UserError
from clip_jax.storage import locations, ranges

# Arguments of the command line. A store keeps their values, to open its data again.
FIELDS = ("data", "split", "data_dir", "image_key", "text_key", "label_key", "group_keys")
_KEYS = ("key", "id", "image_id", *tables.IMAGE_COLUMNS)


def add_data(made: argparse.ArgumentParser) -> None:
    """Adds the arguments that name data."""
    add = made.add_argument
    add(
        "data",
        metavar="DATA",
        help='tar shards: "shards/*.tar", "gs://BUCKET/{00000..00099}.tar" or their directory; '
        'TFRecord files: "DIR/*.tfrecord*"; any other directory: its images, with captions as for '
        "training where it has them; .parquet files with images in a column; captions.txt (one in "
        "a line), .csv, .tsv, .jsonl or .parquet without images: texts alone; tfds:NAME: a "
        "prepared TFDS dataset; digits:SPLIT: the embedded one",
    )
    add("--split", default="train", help='tfds: such as "test" or "train[:10%%]"')
    add("--data_dir", default="", help="tfds: where it is prepared, if not as usual")
    add(
        "--image_key", default="", help="column or feature with the image; default: the usual names"
    )
    add("--text_key", default="", help="column or field with the caption; default: the usual names")
    add("--label_key", default="", help="the same for the class; default: none")
    add("--group_keys", default="", help="the same for groups, comma-separated; default: none")


def is_caption_file(data: str, image_key: str = "") -> bool:
    """Returns whether DATA holds texts without images."""
    if not data.endswith((".txt", *tables.SUFFIXES)) or ":" in data.split("://")[-1]:
        return False
    return not data.endswith(".parquet") or not _holds_images(data, image_key)


def _holds_images(data: str, image_key: str) -> bool:
    """Returns whether .parquet files have a column of images, judged by the first that is there."""
    try:
        paths = locations.expand(data, ".parquet")
        footers = parquet_images.read_footers(paths[:1])
    except UserError:  # said where it is opened
        return False
    columns = [image_key] if image_key else tables.IMAGE_COLUMNS
    return any(parquet_images.holds_images(footers, column) for column in columns)


def picture_root(data: str, image_key: str = "") -> str:
    """Returns the directory that keys are relative to; "": the images are no files of their own."""
    path = locations.parse(data)
    if not path.is_dir() or arguments.kind_of_shards(path):
        return ""
    columns = [image_key] if image_key else tables.IMAGE_COLUMNS
    if not _has_table(path) and parquet_images.find(path, columns):
        return ""
    return str(path)


def _has_table(root: epath.Path) -> bool:
    return any(path.name in folder.TABLES for path in root.iterdir())


def open_source(fields: Mapping[str, str]) -> Source:
    """Opens the source that the values of `FIELDS` name.

    Raises:
      UserError: the data are not there, or not in an expected form.
    """
    data, image_key = fields["data"], fields["image_key"]
    if is_caption_file(data, image_key):
        return CaptionFile(locations.parse(data), fields["text_key"])
    options = argparse.Namespace(**fields)
    if not (root := picture_root(data, image_key)):
        named = arguments.data(data, options)
        named.spec.group_keys = options.group_keys
        return named.open()
    keys = fields["text_key"], fields["label_key"], fields["group_keys"]
    if any(keys) or image_key or _has_table(epath.Path(root)):
        return folder.ImageFolder(root, *keys, image_key=image_key)
    pictures = Pictures(epath.Path(root))
    return folder.ImageFolder(root, *keys) if pictures.are_pairs else pictures


class Pictures:
    """The images of a directory, at any depth, each with the text of KEY.txt if there is one.

    Attributes:
      are_pairs: whether `ImageFolder` can read all of them: every image has a caption, or none has
        and every image has a class.
    """

    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def __init__(self, root: epath.Path):
        """Lists the directory; UserError where it has no image."""
        self._root = root
        visible = [name for name in locations.tree(root) if "/." not in f"/{name}"]
        self._texts = {name for name in visible if name.endswith(".txt")}
        self._names = [name for name in visible if _suffix(name) in IMAGE_SUFFIXES]
        captioned = {_stem(name) for name in visible if _suffix(name) in ("txt", "json")}
        stems = set(map(_stem, self._names))
        in_folders = all("/" in stem for stem in stems)
        self.are_pairs = stems <= captioned or (in_folders and not stems & captioned)
        if not self._names:
            raise UserError(
                f"There is no image in the directory {root}: looked for files ending in "
                f"{', '.join(IMAGE_SUFFIXES)}, at any depth."
            )

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Example:
        return self.start([index])[0]()

    def start(self, indices: Sequence[int]) -> list[Callable[[], Example]]:
        """Starts to read pictures and texts, as `reading.start` does."""
        return [self._start(self._names[index]) for index in indices]

    def _start(self, key: str) -> Callable[[], Example]:
        beside = f"{_stem(key)}.txt"
        names = [key, beside] if beside in self._texts else [key]
        reads = [ranges.start_whole(self._root / name) for name in names]
        return functools.partial(self._example, key, reads)

    def _example(self, key: str, reads: Sequence[Callable[[], bytes]]) -> Example:
        try:
            image, *texts = (read() for read in reads)
        except OSError as error:
            raise BadExample("unreadable file", key, str(error)) from None
        fields = [(text, 1.0) for text in texts or [None]]
        found = captions.collect(fields, key, required=False)
        return Example(image, found, labels=(), key=as_key(key))


class CaptionFile:
    """The texts of a file without images: the lines of a .txt file, or the rows of a table.

    The key of a text is the value of the table's column of identifiers or image paths, by one of
    the usual names; without such a column its number, from 0.
    """

    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def __init__(self, path: epath.Path, text_key: str):
        """Reads the file.

        Args:
          path: a .txt, .csv, .tsv, .jsonl or .parquet file.
          text_key: column with the texts; "": the usual names.

        Raises:
          UserError: it is not there, cannot be read, has no texts, or no column of them.
        """
        text_column, key_column = "", None

        def choose(names: Sequence[str], path: epath.Path) -> list[str]:
            nonlocal text_column, key_column
            if path.suffix == ".txt":
                (text_column,) = names
                return [text_column]
            wanted = [text_key] if text_key else tables.TEXT_COLUMNS
            text_column = tables.pick(names, wanted, path, "captions (name it by --text_key)")
            key_column = next((name for name in _KEYS if name in names), None)
            return [text_column, key_column] if key_column else [text_column]

        table = tables.load([path], choose)
        keys: list[str] = list(map(str, range(len(table))))
        if key_column:
            own = map(tables.path_of, table.columns.get(key_column, ()))
            keys = [as_key(found or number) for found, number in zip(own, keys)]
        self._problems = table.problems
        self._texts = table.columns.get(text_column, ())
        self._rows = list(enumerate(keys))
        if path.suffix == ".txt":
            self._rows = [
                (row, key)
                for (row, key), text in zip(self._rows, self._texts)
                if text is None or text.strip()
            ]
        if not self._rows:
            raise UserError(f"There is no text in {path}.")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row, key = self._rows[index]
        value = self._texts[row]
        if value is None and row in self._problems:
            raise BadExample(self._problems[row], key)
        return Example(b"", captions.collect([(value, 1.0)], key), labels=(), key=key)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix[1:].lower()


def _stem(name: str) -> str:
    return name.rpartition(".")[0]
