"""The classes of the samples of tar shards, and the descriptions in CLIP_benchmark's layout.

That layout is ROOT/SPLIT/0.tar, 1.tar, ... with KEY.webp, .png or .jpg beside KEY.cls (a class
number), KEY.npy (a set of classes) or KEY.txt (captions, one in a line), and files in ROOT that
describe the set: classnames.txt, zeroshot_classification_templates.txt ("{c}" for the name) and
dataset_type.txt ("retrieval" or "multilabel"; else one class each).
"""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from clip_jax.data.sources import captions
from clip_jax.errors import BadExample
from clip_jax.storage import ranges, remote

FILES = ("cls", "npy")  # kinds of file with classes


@dataclasses.dataclass(frozen=True)
class Layout:
    """The description of a set, from the files beside its shards.

    Attributes:
      class_names: names of the classes, by label; empty where there are none.
      templates: prompt templates, with {} for the name.
      type: "retrieval", "multilabel" or "".
    """

    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    type: str


def read_layout(root: epath.Path) -> Layout:
    """Reads the description of a set in CLIP_benchmark's layout; empty where there is none."""
    if remote.is_remote(root) and not remote.split(root)[1]:
        return Layout((), (), "")  # above the root of a bucket
    templates = _lines(root / "zeroshot_classification_templates.txt")
    return Layout(
        class_names=_lines(root / "classnames.txt"),
        templates=tuple(template.replace("{c}", "{}") for template in templates if template),
        type="".join(_lines(root / "dataset_type.txt")).lower(),
    )


def label_kind(label_key: str) -> str:
    """The kind of file that holds the class of a sample."""
    return label_key if label_key in FILES else "json"


def decode_label(data: bytes, label_key: str) -> Any:
    """Decodes the class of a sample.

    Args:
      data: the file of kind `label_kind(label_key)`.
      label_key: one of `FILES`, or a field of the .json file.

    Returns:
      A number or name, a list of them, an array of a .npy file; None where there is none that
      can be read.
    """
    kind = label_kind(label_key)
    try:
        if kind == "json":
            return captions.read_field(data, label_key, "")
        if kind == "cls":
            return data.decode("utf-8").strip()
    except (BadExample, ValueError):
        return None
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception:  # a header that lies fails in many ways
        return None
    is_numeric = isinstance(array, np.ndarray) and array.dtype.kind in "biuf"
    return array if is_numeric and np.isfinite(array).all() else None


def decode_arrays(values: Sequence[np.ndarray | None]) -> list[list[Any] | None]:
    """Converts arrays of .npy files to lists of classes.

    If all of them can be, they are taken as vectors of zeros and ones with one entry per class;
    else as lists of the classes.
    """
    arrays = [np.zeros(0) if value is None else np.ravel(value) for value in values]
    lengths = {len(array) for array, value in zip(arrays, values) if value is not None}
    vectors = len(lengths) == 1 and lengths != {1} and all(map(_is_indicator, arrays))
    lists = map(np.flatnonzero, arrays) if vectors else arrays
    return [None if value is None else found.tolist() for value, found in zip(values, lists)]


def _is_indicator(array: np.ndarray) -> bool:
    return bool(np.isin(array, (0, 1)).all())


def _lines(path: epath.Path) -> tuple[str, ...]:
    """The stripped lines of a file, empty ones too, since their number is the label.

    Empty where there is no file.
    """
    try:
        text = ranges.read(path).decode("utf-8", "replace")
    except FileNotFoundError:
        return ()
    return tuple(line.strip() for line in text.splitlines())
