"""Embeddings by teachers, for distillation: their fields of a batch, and those that data keep."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32
from ml_collections import ConfigDict

from clip_jax.configs import default
from clip_jax.data.sources.base import Example, Source
from clip_jax.errors import BadExample, UserError

_TRIED = 20  # examples that are looked at before a run


class StoredTeacher(NamedTuple):
    """The fields with the embeddings by one teacher.

    Attributes:
      image, text: names of the fields.
      width: numbers in each.
    """

    image: str
    text: str
    width: int


def parse(teacher_keys: str) -> tuple[StoredTeacher, ...]:
    """Parses "image_a+text_a:768,image_b+text_b:512".

    Raises:
      UserError: it is of another form.
    """
    found = []
    for item in filter(None, (item.strip() for item in teacher_keys.split(","))):
        names, _, width = item.rpartition(":")
        image, _, text = (name.strip() for name in names.partition("+"))
        if not (image and text and width.strip().isdecimal() and int(width)):
            raise UserError(
                f"source.teacher_keys = {teacher_keys!r} is not understood: for each teacher it "
                "takes the names of the fields with its embeddings of image and caption, and the "
                'numbers in each, as in "l14_image+l14_text:768"; several are separated by commas.'
            )
        found.append(StoredTeacher(image, text, int(width)))
    return tuple(found)


def of_data(config: ConfigDict) -> tuple[StoredTeacher, ...]:
    """Returns the teachers that the training data keep, of the fields of `data`.

    Raises:
      UserError: sources of a mixture keep different ones.
    """
    found = [parse(source.teacher_keys) for source in default.sources(config)]
    widths = [[teacher.width for teacher in each] for each in found]
    if any(each != widths[0] for each in widths):
        raise UserError(
            "The sources of data.mixture keep embeddings of different teachers: by their "
            "teacher_keys, of the widths "
            f"{' and '.join(str(each or 'none') for each in widths)}. A batch has those of all: "
            "name the same teachers in each source, in the same order."
        )
    return found[0]


def field_names(number: int) -> tuple[str, str]:
    """Returns the fields of a batch with the embeddings of images and texts by a teacher.

    Args:
      number: number of the teacher, from 0; those that the data keep come first.
    """
    return f"teacher/{number}/image", f"teacher/{number}/text"


def stored_fields(config: ConfigDict) -> dict[str, int]:
    """Returns the widths of those that the training data keep; arguments as `of_data`."""
    numbered = enumerate(of_data(config))
    return {name: teacher.width for number, teacher in numbered for name in field_names(number)}


def check(config: ConfigDict, source: Source) -> None:
    """Checks the embeddings that the training data keep on their first examples.

    Args:
      config: the fields of `data` in configs/default.py.
      source: the opened data.

    Raises:
      UserError: a source has none there that can be used.
    """
    if not (fields := stored_fields(config)):
        return
    for part in getattr(source, "parts", [source]):
        problem = None
        for index in range(min(_TRIED, len(part))):
            try:
                read(part[index], fields)
                break
            except BadExample as error:
                problem = problem or error
        else:
            raise UserError(
                f"None of the first {_TRIED} examples of the data has the embeddings that "
                f"source.teacher_keys names: {problem}. Give the names of their fields, and the "
                "numbers that each has."
            )


def read(example: Example, fields: Mapping[str, int]) -> dict[str, Float32[np.ndarray, " width"]]:
    """Returns the embeddings of an example by the field of a batch.

    Args:
      example: an example, whose last `groups` are the values.
      fields: from `stored_fields`.

    Raises:
      BadExample: one cannot be used, see `decode`; or it may belong to another caption than the one
        that is drawn.
    """
    if fields and len(example.captions.texts) > 1:
        raise BadExample("several captions and one teacher embedding", example.key)
    values = example.groups[len(example.groups) - len(fields) :]
    named = zip(fields.items(), values, strict=True)
    return {name: decode(value, width, example.key) for (name, width), value in named}


def decode(value: Any, width: int, key: str) -> Float32[np.ndarray, " width"]:
    """Returns an embedding with length 1.

    Args:
      value: array, list of numbers, or that list as text; "": there is none.
      width: numbers that it must have.
      key: name of the example, for errors.

    Raises:
      BadExample: it is missing, no list of numbers, of another width, not finite or zero.
    """
    if isinstance(value, str) and not value.strip():
        raise BadExample("no teacher embedding", key)
    try:
        value = json.loads(value) if isinstance(value, str) else value
        embed = np.asarray(value, np.float64)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise BadExample("unreadable teacher embedding", key, str(error)[:80]) from None
    if embed.shape != (width,):
        raise BadExample(f"teacher embedding of {embed.size} numbers, not {width}", key)
    length = np.linalg.norm(embed)
    if not 0 < length < np.inf:
        raise BadExample("teacher embedding without a direction", key, f"its length is {length}")
    return (embed / length).astype(np.float32)
