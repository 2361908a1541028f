"""The captions of an example: the fields that hold them, and the draw among them."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from clip_jax.errors import BadExample, UserError

MAX_CHARACTERS = 2**16  # longer texts are web pages or logs, not captions


class Field(NamedTuple):
    """A field that holds captions, and its weight in the draw."""

    name: str
    weight: float


class Captions(NamedTuple):
    """All captions of an example; training draws among them by weight."""

    texts: tuple[str, ...]
    weights: tuple[float, ...]


def parse_fields(text_key: str) -> tuple[Field, ...]:
    """Parses "caption:0.3,synthetic:0.7"; a field without a weight has weight 1.

    Raises:
      UserError: a weight is not a positive number, or a name is empty.
    """
    fields = []
    for item in filter(None, (item.strip() for item in text_key.split(","))):
        name, _, weight = item.partition(":")
        try:
            fields.append(Field(name.strip(), float(weight or 1)))
        except ValueError:
            fields.append(Field("", 0))
        if not fields[-1].name or not 0 < fields[-1].weight < float("inf"):
            raise UserError(
                f"source.text_key = {text_key!r} is not understood: it takes names of fields, "
                'comma-separated, each with a weight or without, as in "caption:0.3,synthetic:0.7".'
            )
    return tuple(fields)


def collect(values: Iterable[tuple[Any, float]], key: str, required: bool = True) -> Captions:
    """Collects the captions of an example, without empty ones.

    Args:
      values: (value, weight) of each field. A value is a caption as str or UTF-8 bytes, a (nested)
        sequence of captions that share the weight, or None.
      key: name of the example, for errors.
      required: whether an example without captions is an error.

    Raises:
      BadExample: "no caption", "empty caption", "caption too long" or "invalid UTF-8 caption".
    """
    texts: list[str] = []
    weights: list[float] = []
    blank = False
    for value, weight in values:
        found = [_text(item, key) for item in _flat(value)]
        full = [text for text in found if text.strip()]
        blank |= len(full) < len(found)
        texts += full
        weights += [weight / len(full) for _ in full]
    if not texts and required:
        raise BadExample("empty caption" if blank else "no caption", key)
    return Captions(tuple(texts), tuple(weights))


def draw(captions: Captions, count: int, rng: np.random.Generator) -> list[str]:
    """Draws captions by weight, without replacement; uses no randomness if there is only one.

    Where there are fewer than `count`, all of them are drawn before any is drawn once more.
    """
    drawn: list[str] = []
    left: list[tuple[str, float]] = []
    while len(drawn) < count:
        left = left or list(zip(*captions)) or [("", 1.0)]
        place = 0
        if len(left) > 1:
            bounds = np.cumsum([weight for _, weight in left])
            place = int(np.searchsorted(bounds, rng.random() * bounds[-1], side="right"))
        text, _ = left.pop(min(place, len(left) - 1))
        drawn.append(text)
    return drawn


def read_files(
    txt: bytes | Sequence[bytes] | None,
    record: bytes | None,
    fields: Sequence[Field],
    key: str,
    required: bool = True,
) -> Captions:
    """Collects the captions in the files beside an image.

    Args:
      txt: contents of the .txt file, or its captions one by one; None: there is no such file.
      record: contents of the .json file; None: there is no such file.
      fields: fields of the .json file, or "txt" for the .txt file; (): the .txt file, or else
        "caption" of the .json file.
      key: name of the example, for errors.
      required: whether an example without captions is an error.

    Raises:
      BadExample: "unreadable json", or a reason of `collect`.
    """
    if not fields:
        fields = (Field("caption" if txt is None else "txt", 1.0),)
    values = [
        (txt if name == "txt" else read_field(record, name, key), weight) for name, weight in fields
    ]
    return collect(values, key, required)


def read_field(record: bytes | None, field: str, key: str) -> Any:
    """Returns a field of a JSON file, None if it is missing; BadExample: the file is not JSON."""
    if record is None:
        return None
    try:
        return json.loads(record).get(field)
    except (ValueError, AttributeError, RecursionError) as error:
        raise BadExample("unreadable json", key, str(error)) from None


def _flat(value: Any) -> Iterable[Any]:
    if isinstance(value, (list, tuple, np.ndarray)):
        for item in value:
            yield from _flat(item)
    elif value is not None:
        yield value


def _text(value: Any, key: str) -> str:
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadExample("invalid UTF-8 caption", key, str(error)) from None
    text = value if isinstance(value, str) else ""  # a number or an object is not a caption
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
            raise BadExample("invalid UTF-8 caption", key, str(error)) from None
    if len(text) > MAX_CHARACTERS:
        raise BadExample("caption too long", key, f"{len(text):,} characters")
    return text
