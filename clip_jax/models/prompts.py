"""Prompts to be scored: what they have in common need not be computed for each."""

from typing import NamedTuple

import jax
import numpy as np

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
