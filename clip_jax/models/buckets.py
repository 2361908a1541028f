"""Texts in batches of like length: a tower that reads only the past need not compute padding."""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import ArrayLike

from clip_jax.models.sizes import Size

_STEP = 8  # lengths are multiples of it, so that there are few programs to compile


def embed(
    encode: Callable[[np.ndarray], ArrayLike], tokens: np.ndarray, size: Size, batch_size: int
) -> np.ndarray:
    """Embeds any number of texts; the arguments of `batches`, and what embeds one of its batches.

    Args:
      encode: int32 [batch_size, length] -> float32 [batch_size, embed_dim].
      tokens: int32 [n, s].
      size: of the model.
      batch_size: rows in each call.

    Returns:
      float32 [n, embed_dim].
    """
    embeds = np.zeros((len(tokens), size.embed_dim), np.float32)
    for rows, batch in batches(tokens, size, batch_size):
        embeds[rows] = np.asarray(encode(batch))[: len(rows)]
    return embeds


def batches(
    tokens: np.ndarray, size: Size, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Splits texts into batches that cover each text once, the shortest first.

    A text tower gives the same for the batches as for the whole rows. Where it is causal and reads
    the end token, a batch is cut to its longest text, rounded up to a multiple of 8; any other
    tower gets rows of full length.

    Args:
      tokens: int32 [n, s], each row up to its end token, its largest id, and zeros.
      size: of the model.
      batch_size: rows in each batch; the last batch is padded with zeros.

    Yields:
      int64 [m], where the texts stand in `tokens`, m at most batch_size; int32
      [batch_size, length], those texts.
    """
    lengths = np.full(len(tokens), tokens.shape[1])
    if size.text_causal and size.text_pool == "end":
        lengths = tokens.argmax(axis=1) + 1
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        length = min(-(-int(lengths[rows[-1]]) // _STEP) * _STEP, tokens.shape[1])
        batch = np.zeros((batch_size, length), tokens.dtype)
        batch[: len(rows)] = tokens[rows, :length]
        yield rows, batch
