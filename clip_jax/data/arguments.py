"""Command-line arguments of the data commands: they name the data to work on."""

import argparse
import dataclasses

from etils import epath
from ml_collections import ConfigDict

from clip_jax.common import commands
from clip_jax.configs import default
from clip_jax.data.sources import opening
from clip_jax.data.sources.base import Source
from clip_jax.errors import UserError
from clip_jax.storage import locations, remote

# Pixels along a side where a source draws its images; the embedded digits are scans of 8 x 8.
_DRAWN = 64
_CHUNK = 32  # neighbours in a shard that are read at once
# For the index of shards whose own directory cannot be written to.
_FALLBACK_DIR = "~/.cache/clip_jax"

_TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
_ABOUT_DATA = (
    'tar shards: "shards/*.tar", "gs://BUCKET/{00000..00099}.tar" or their directory; TFRecord '
    'files: "DIR/*.tfrecord*" or their directory; any other directory: images with captions in '
    "captions.csv, .tsv, .jsonl, .parquet or in KEY.txt beside KEY.jpg; such a table; .parquet "
    "files with images in a column; tfds:NAME: a prepared TFDS dataset; digits:SPLIT: the embedded "
    "one"
)


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """Makes a parser with the arguments that all data commands have.

    Args:
      command: name of the command, behind "python -m clip_jax data".
      description: description of the command, with examples; shown as it stands.
    """
    made = commands.parser(f"data {command}", description)
    made.add_argument("data", metavar="DATA", help=_ABOUT_DATA)
    made.add_argument("--split", default="train", help='tfds: such as "test" or "train[:10%%]"')
    made.add_argument("--data_dir", default="", help="tfds: where it is prepared, if not as usual")
    made.add_argument(
        "--image_key", default="", help="column or feature with the image; default: the usual names"
    )
    made.add_argument(
        "--text_key",
        default="",
        help="column, .json field or feature with the caption, several comma-separated; "
        "default: the usual names",
    )
    made.add_argument(
        "--label_key",
        default="",
        help='the same for the class; of tar shards "cls" and "npy" are files; default: none',
    )
    made.add_argument(
        "--workers",
        type=commands.at_least(0),
        default=0,
        metavar="N",
        help="processes; 0: one per core. More help where the data are remote",
    )
    return made


@dataclasses.dataclass(frozen=True)
class Data:
    """A description of the data of a command, by which any process can open them.

    Attributes:
      spec: the fields of `source()` in configs/default.py.
      in_order: whether neighbours are wanted one after the other, and so are read at once.
    """

    spec: ConfigDict
    in_order: bool

    def open(self) -> Source:
        """Opens the source; raises UserError where the data are not there."""
        return opening.create(
            self.spec,
            image_size=_DRAWN,
            seed=0,
            fallback_dir=epath.Path(_FALLBACK_DIR).expanduser(),
            chunk=_CHUNK,
            cached_chunks=int(self.in_order),
        )


def data(name: str, options: argparse.Namespace, in_order: bool = True) -> Data:
    """Returns the data that a command line names.

    Args:
      name: the argument DATA.
      options: the options, as parsed by `parser`.
      in_order: see `Data`.

    Raises:
      UserError: `name` names no data.
    """
    kind, rest = _kind(name)
    spec = default.source(type=kind, text_key=options.text_key, label_key=options.label_key)
    if kind == "digits":
        spec.split = rest
    elif kind == "tfds":
        spec.update(name=rest, path=options.data_dir, split=options.split)
    else:
        spec.path = rest
    if kind in ("folder", "tfds", "tfrecord"):
        spec.image_key = options.image_key
    return Data(spec, in_order)


def _kind(data: str) -> tuple[str, str]:
    """Returns source.type, and the rest of DATA for name, split or path."""
    prefix, colon, rest = data.partition(":")
    if colon and prefix in opening.TYPES:
        return prefix, rest
    names = [item.strip().rpartition("/")[2] for item in data.split(",")]
    if any(".tfrecord" in name or ".tfrec" in name for name in names):
        return "tfrecord", data
    if any(".tar" in name for name in names):
        return "tar", data
    if data.endswith(_TABLES):
        return "folder", data
    return _kind_of_directory(data), data


def _kind_of_directory(data: str) -> str:
    path = locations.parse(data)
    if not path.is_dir():
        if remote.is_remote(path):
            locations.check_bucket(path)
        raise UserError(
            f"{data!r} is neither a directory nor the name of shards. It takes {_ABOUT_DATA}."
        )
    return kind_of_shards(path) or "folder"


def kind_of_shards(directory: epath.Path) -> str:
    """Returns the kind of shards in a directory, "tar" or "tfrecord"; "": it has none."""
    names = [path.name for path in directory.iterdir()]
    if any(name.endswith(".tar") for name in names):
        return "tar"
    return "tfrecord" if any(".tfrecord" in name for name in names) else ""
