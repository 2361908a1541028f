"""Prompts of classes: made from templates, averaged, and prepared to be scored together."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from clip_jax.errors import UserError

Array = np.ndarray | jax.Array


class Prompts(NamedTuple):
    """Prompts of p captions and their u distinct beginnings.

    The likelihood of a caption is a product over its beginnings: of what follows each. Prompts
    share most of theirs ("a photo of a" of a thousand classes), and the softmax over the vocabulary
    behind a beginning is what costs.

    Attributes:
      tokens: int32 [p, s], without the padding that all share.
      rows: int32 [u], a prompt that begins so; where there is one, the prompt that ends there.
      ends: int32 [u], the place of the last token of each beginning.
      beginnings: int32 [p, s - 1], the beginning up to each place of each prompt; behind the last
        one that something follows, any.
    """

    tokens: Array
    rows: Array
    ends: Array
    beginnings: Array


def prepare(tokens: np.ndarray) -> Prompts:
    """Of rows of ids [p, s], each up to its end token, its largest id, and zeros."""
    lengths = tokens.argmax(axis=1)
    tokens = tokens[:, : lengths.max() + 1]
    known: dict[bytes, int] = {}
    rows, ends = [], []
    beginnings = np.zeros((len(tokens), tokens.shape[1] - 1), np.int32)
    for prompt in np.argsort(lengths, kind="stable"):  # so what ends comes before what goes on
        for end in range(lengths[prompt]):
            key = tokens[prompt, : end + 1].tobytes()
            if key not in known:
                known[key] = len(rows)
                rows.append(prompt)
                ends.append(end)
            beginnings[prompt, end] = known[key]
    return Prompts(tokens, np.array(rows, np.int32), np.array(ends, np.int32), beginnings)


def class_prompts(
    class_names: Sequence[str], templates: Sequence[str]
) -> tuple[list[str], np.ndarray]:
    """Every name of every class in every template.

    Args:
      class_names: alternatives of one class joined by "|".
      templates: each with one {} for the name.

    Returns:
      The prompts, and the class of each, int [prompts].

    Raises:
      UserError: no class, no template, or a template without its {}.
    """
    if not class_names or not templates:
        raise UserError(
            "Zero-shot classification needs class names and templates: the data names none, so "
            "set eval.zeroshot.class_names and eval.zeroshot.templates in the config."
        )
    if bad := [template for template in templates if template.count("{}") != 1]:
        raise UserError(f"The template {bad[0]!r} must have exactly one {{}} for the class name.")
    prompts, owners = [], []
    for owner, names in enumerate(class_names):
        for name in names.split("|"):
            prompts += [template.replace("{}", name) for template in templates]
            owners += [owner] * len(templates)
    return prompts, np.array(owners)


def average_classes(embeds: np.ndarray, owners: np.ndarray, classes: int) -> np.ndarray:
    """Means of the prompts' unit vectors [prompts, e], normalised again: float32 [classes, e]."""
    sums = np.zeros((classes, embeds.shape[1]))
    np.add.at(sums, owners, embeds)
    return (sums / np.linalg.norm(sums, axis=1, keepdims=True)).astype(np.float32)
