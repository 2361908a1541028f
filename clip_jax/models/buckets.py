"""Texts in batches of similar length, so that a causal tower computes little padding."""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float32, Int
from numpy.typing import ArrayLike

from clip_jax.models.image_model import end_places
from clip_jax.models.sizes import Size

_STEP = 8  # lengths are multiples of it, so that few programs are compiled


def embed(
    encode: Callable[[np.ndarray], ArrayLike],
    tokens: Int[np.ndarray, "texts length"],
    size: Size,
    batch_size: int,
) -> Float32[np.ndarray, "texts embed"]:
    """Embeds any number of texts.

    Args:
      encode: embeds a batch, int32 [batch_size, length] -> float32 [batch_size, embed_dim].
      tokens: see `batches`.
      size: the model's.
      batch_size: rows in each call.
    """
    embeds = np.zeros((len(tokens), size.embed_dim), np.float32)
    for rows, batch in batches(tokens, size, batch_size):
        embeds[rows] = np.asarray(encode(batch))[: len(rows)]
    return embeds


def batches(
    tokens: Int[np.ndarray, "texts length"], size: Size, batch_size: int
) -> Iterator[tuple[Int[np.ndarray, " rows"], Int[np.ndarray, "{batch_size} cut"]]]:
    """Splits texts into batches that cover each text once, the shortest first.

    A text tower gives equal results for the batches and for whole rows. Where it is causal and
    reads the end token, a batch is cut to its longest text, rounded up to a multiple of 8; any
    other tower gets rows of full length.

    Args:
      tokens: texts, each up to its end token, and padding.
      size: the model's.
      batch_size: rows in each batch; the last batch is padded with zeros.

    Yields:
      Places of the texts in `tokens`, at most batch_size; and those texts.
    """
    lengths = np.full(len(tokens), tokens.shape[1])
    if size.text_causal and size.text_pool == "end":
        lengths = np.asarray(end_places(tokens, size.end_token)) + 1
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        length = min(-(-int(lengths[rows[-1]]) // _STEP) * _STEP, tokens.shape[1])
        batch = np.zeros((batch_size, length), tokens.dtype)
        batch[: len(rows)] = tokens[rows, :length]
        yield rows, batch
