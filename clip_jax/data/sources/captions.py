"""The captions of an example: which fields hold them, and which one is read this time."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from clip_jax.errors import BadExample, UserError

MAX_CHARACTERS = 2**16  # of a caption; longer ones are web pages or logs, not captions


class Field(NamedTuple):
    """A place that holds captions, and how often they are taken compared with other places'."""

    name: str
    weight: float


class Captions(NamedTuple):
    """All captions of an example; training draws one of them by weight."""

    texts: tuple[str, ...]
    weights: tuple[float, ...]


def parse_fields(text_key: str) -> tuple[Field, ...]:
    """ "caption:0.3,synthetic:0.7" -> its fields; without a weight, 1.

    Raises:
      UserError: a weight is no positive number, or a name is empty.
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
    """What the fields of an example hold -> its captions, without empty ones.

    Args:
      values: per field a caption, or a (nested) sequence of captions that share its weight, as
        str or UTF-8 bytes, or None; and the weight of the field.
      key: names the example in errors.
      required: whether there must be one.

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


def choose(captions: Captions, rng: np.random.Generator) -> str:
    """One of them, at random by weight; draws nothing where there is no choice."""
    texts, weights = captions
    if len(texts) < 2:
        return texts[0] if texts else ""
    bounds = np.cumsum(weights)
    place = np.searchsorted(bounds, rng.random() * bounds[-1], side="right")
    return texts[min(int(place), len(texts) - 1)]


def read_files(
    txt: bytes | Sequence[bytes] | None,
    record: bytes | None,
    fields: Sequence[Field],
    key: str,
    required: bool = True,
) -> Captions:
    """The captions among the files that stand beside an image.

    Args:
      txt: the .txt file, or its captions one by one; None: there is none.
      record: the .json file, None: there is none.
      fields: of the .json file, "txt" standing for the .txt file; (): the .txt file, or else
        "caption" of the .json file.
      key: names the example in errors.
      required: whether there must be one.

    Raises:
      BadExample: as `collect`, or "unreadable json".
    """
    if not fields:
        fields = (Field("caption" if txt is None else "txt", 1.0),)
    values = [
        (txt if name == "txt" else read_field(record, name, key), weight) for name, weight in fields
    ]
    return collect(values, key, required)


def read_field(record: bytes | None, field: str, key: str) -> Any:
    """`field` of a JSON file; None where file or field is missing. BadExample if not JSON."""
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
    text = value if isinstance(value, str) else ""  # a number or an object is no caption
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
            raise BadExample("invalid UTF-8 caption", key, str(error)) from None
    if len(text) > MAX_CHARACTERS:
        raise BadExample("caption too long", key, f"{len(text):,} characters")
    return text
