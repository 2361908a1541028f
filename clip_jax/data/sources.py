"""Sources: random access to stored examples, whatever they are stored in."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from clip_jax.errors import BadExample, UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")


@dataclasses.dataclass(frozen=True)
class Example:
    """One image-text pair as stored.

    Attributes:
      image: an encoded file, or uint8 [h, w, 3].
      text: the caption; "" where the set has none.
      label: class index, -1: none.
      key: names the example in messages.
    """

    image: bytes | np.ndarray
    text: str
    label: int
    key: str


class Source(Protocol):
    """Random access to examples; called from many threads at once.

    Attributes:
      class_names: by label; empty where the set has no classes, or only their numbers.
      templates: prompt templates natural to the set, such as "a photo of a {}."; may be empty.
    """

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def templates(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """The example stored at `index`, the same at every call; may raise BadExample."""
        ...


def create(spec: ConfigDict, image_size: int, seed: int) -> Source:
    """The source that `spec` names.

    Args:
      spec: the fields of `source()` in configs/default.py.
      image_size: pixels along a side, for sources that draw their images.
      seed: of sources that draw their images.

    Raises:
      UserError: the data is not there or not in the expected form.
    """
    if spec.type == "digits":
        from clip_jax.data.digits import DigitScenes

        return DigitScenes(spec.split, image_size, seed)
    if spec.type == "folder":
        from clip_jax.data.folder import ImageFolder

        return ImageFolder(spec.path, spec.text_key, spec.label_key)
    if spec.type == "tar":
        from clip_jax.data.tar import TarShards

        return TarShards(spec.path, spec.text_key, spec.label_key)
    if spec.type == "tfds":
        from clip_jax.data.tfds_source import TfdsSource

        return TfdsSource(spec)
    if spec.type == "synthetic":
        return Synthetic(spec.size, image_size, seed)
    raise UserError(
        f"The config names no data it can read: source.type is {spec.type!r}, and must be one of "
        '"digits", "folder", "tar", "tfds", "synthetic". To try it with the embedded set, add '
        "--config.data.source.type=digits --config.data.source.split=train to the command."
    )


_WORDS = ("a", "the", "red", "small", "old", "dog", "cat", "house", "tree", "on", "under", "near")


class Synthetic:
    """Noise with random captions, for benchmarks: nothing to read or decode."""

    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def __init__(self, size: int, image_size: int, seed: int):
        if size < 1:
            raise UserError(f"A synthetic source needs source.size of at least 1, not {size}.")
        self._size = size
        self._image_size = image_size
        self._seed = seed

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng([self._seed, index])
        shape = (self._image_size, self._image_size, 3)
        image = np.frombuffer(rng.bytes(int(np.prod(shape))), np.uint8).reshape(shape)
        text = " ".join(rng.choice(_WORDS, size=rng.integers(4, 17)))
        return Example(image=image, text=text, label=-1, key=f"synthetic {index}")


def read_caption(txt: bytes | None, record: bytes | None, text_key: str, key: str) -> str:
    """The caption among the files that stand beside an image.

    Args:
      txt: the .txt file, None: there is none.
      record: the .json file, None: there is none.
      text_key: of the .json file; "": the .txt file, or else "caption" of the .json file.
      key: names the example in errors.

    Raises:
      BadExample: "no caption", "invalid UTF-8 caption" or "unreadable json".
    """
    if txt is not None and not text_key:
        try:
            return txt.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadExample("invalid UTF-8 caption", key, str(error)) from None
    text = read_field(record, text_key or "caption", key)
    if not isinstance(text, str):
        raise BadExample("no caption", key, f"{text_key or 'caption'!r} is {text!r}")
    return text


def read_field(record: bytes | None, field: str, key: str) -> Any:
    """`field` of a JSON file; None where file or field is missing. BadExample if not JSON."""
    if record is None:
        return None
    try:
        return json.loads(record).get(field)
    except (ValueError, AttributeError) as error:
        raise BadExample("unreadable json", key, str(error)) from None


def number_labels(values: Sequence[Any]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class labels as found in a file -> numbers and names.

    Args:
      values: per example; None: no label. Integers stand for themselves, anything else for a
        name, numbered in sorted order.

    Returns:
      int32 [n], -1: none; and the names, empty where the labels are integers already.

    Raises:
      UserError: no example has a label.
    """
    known = [value for value in values if value is not None]
    if not known:
        raise UserError("No example has a class under source.label_key; is it misspelt?")
    if all(_is_integer(value) for value in known):
        return np.array([-1 if v is None else int(v) for v in values], np.int32), ()
    return number_names([None if value is None else str(value) for value in values])


def number_names(values: Sequence[str | None]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class names (None: no class) -> int32 [n], -1: none; and the names in sorted order."""
    names = sorted({value for value in values if value is not None})
    number = {None: -1} | {name: index for index, name in enumerate(names)}
    return np.array([number[value] for value in values], np.int32), tuple(names)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and value.isdecimal())
