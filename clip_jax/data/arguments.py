"""What the data commands share: how the data to work on are named on the command line."""

import argparse
import dataclasses
from typing import TYPE_CHECKING

from etils import epath

from clip_jax.common import commands
from clip_jax.errors import UserError
from clip_jax.storage import locations, remote

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from clip_jax.data.sources.base import Source

# Pixels along a side where a source draws its images; the embedded digits are scans of 8 x 8.
_DRAWN = 64
_RUN = 32  # neighbours in a shard that are read at once
_FALLBACK_DIR = (
    "~/.cache/clip_jax"  # for the index of shards whose own directory cannot be written to
)

_ABOUT_DATA = (
    'tar shards: "shards/*.tar", "gs://BUCKET/{00000..00099}.tar" or their directory; TFRecord '
    'files: "DIR/*.tfrecord*" or their directory; any other directory: images with captions in '
    "captions.csv, .tsv, .jsonl, .parquet or in KEY.txt beside KEY.jpg; tfds:NAME: a prepared "
    "TFDS dataset; digits:SPLIT: the embedded one"
)


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser with the arguments that all data commands have.

    Args:
      command: behind "python -m clip_jax data".
      description: what it does, with examples; shown as it stands.
    """
    made = commands.parser(f"data {command}", description)
    made.add_argument("data", metavar="DATA", help=_ABOUT_DATA)
    made.add_argument("--split", default="train", help='tfds: such as "test" or "train[:10%%]"')
    made.add_argument("--data_dir", default="", help="tfds: where it is prepared, if not as usual")
    made.add_argument("--image_key", default="", help="tfds, TFRecord: feature with the image")
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
        type=at_least(0),
        default=0,
        metavar="N",
        help="processes; 0: one per core. More help where the data are remote",
    )
    return made


def at_least(lowest: int):
    """A type for argparse: integers from `lowest` on."""

    def integer(text: str) -> int:
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text} is less than {lowest}")
        return int(text)

    return integer


def share(text: str) -> float:
    """A type for argparse: fractions from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


@dataclasses.dataclass(frozen=True)
class Data:
    """Where examples come from, and how they will be read.

    Attributes:
      spec: the fields of `source()` in configs/default.py.
      in_order: whether neighbours are wanted one after the other, and so are read at once.
    """

    spec: "ConfigDict"
    in_order: bool

    def open(self) -> "Source":
        """The source; UserError where the data are not there."""
        from clip_jax.data.sources import opening

        runs = {"run": _RUN, "cached_chunks": 1} if self.in_order else {}
        fallback_dir = epath.Path(_FALLBACK_DIR).expanduser()
        return opening.create(
            self.spec, image_size=_DRAWN, seed=0, fallback_dir=fallback_dir, **runs
        )


def data(name: str, options: argparse.Namespace, in_order: bool = True) -> Data:
    """The data that a command line names.

    Args:
      name: as DATA.
      options: as parsed by `parser`.
      in_order: as in `Data`.

    Raises:
      UserError: it cannot be told what `name` is.
    """
    from clip_jax.configs import default

    kind, rest = _kind(name)
    spec = default.source(type=kind, text_key=options.text_key, label_key=options.label_key)
    if kind == "digits":
        spec.split = rest
    elif kind == "tfds":
        spec.update(name=rest, path=options.data_dir, split=options.split)
    else:
        spec.path = rest
    if kind in ("tfds", "tfrecord"):
        spec.image_key = options.image_key
    return Data(spec, in_order)


def _kind(data: str) -> tuple[str, str]:
    """source.type, and what remains of DATA for name, split or path."""
    prefix, colon, rest = data.partition(":")
    if colon and prefix in ("tfds", "digits"):
        return prefix, rest
    names = [item.strip().rpartition("/")[2] for item in data.split(",")]
    if any(".tfrecord" in name or ".tfrec" in name for name in names):
        return "tfrecord", data
    if any(".tar" in name for name in names):
        return "tar", data
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
    """What the shards of a directory are, "tar" or "tfrecord"; "": it has none."""
    names = [path.name for path in directory.iterdir()]
    if any(name.endswith(".tar") for name in names):
        return "tar"
    return "tfrecord" if any(".tfrecord" in name for name in names) else ""
