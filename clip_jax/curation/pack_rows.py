"""How many rows of the text tower captions need when several share a row (model.packing)."""

import os
from typing import Any

import numpy as np

from clip_jax.curation.tally import Tally

_LENGTHS = (80, 128)  # of a row, in tokens
_CAPTIONS = (32, 128, 512)  # packed together: those of one device and micro-batch
_BATCHES = 200
_ENOUGH_FOR = 0.99  # of the batches


def suggest(ids: Tally, context_length: int) -> list[dict[str, Any]]:
    """Values for model.packing.rows that 99 of 100 batches get by with, by simulation.

    Args:
      ids: of each caption, start and end token included.
      context_length: to which captions are cut.

    Returns:
      For each number of captions that are packed together a row: "captions", and by the length
      of a row ("80") the rows per caption, rounded up to hundredths.
    """
    values, numbers = ids.values()
    rng = np.random.default_rng(0)
    lengths = [length for length in _LENGTHS if length >= context_length]
    suggested = []
    for captions in _CAPTIONS:
        drawn = rng.choice(values, (_BATCHES, captions), p=numbers / numbers.sum())
        drawn = np.minimum(drawn, context_length).astype(np.int32)
        row: dict[str, Any] = {"captions": captions}
        for length in lengths:
            rows = rows_used(drawn, context_length, length)
            most = np.quantile(rows, _ENOUGH_FOR, method="higher")
            row[str(length)] = float(np.ceil(100 * most / captions) / 100)
        suggested.append(row)
    return suggested


def rows_used(ids: np.ndarray, context_length: int, length: int) -> np.ndarray:
    """Rows that each batch packs into.

    Args:
      ids: int32 [batches, captions], tokens of each caption, at most `context_length`.
      context_length: tokens in an unpacked row.
      length: tokens in a packed one.

    Returns:
      int32 [batches].
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an accelerator may be busy training
    import jax

    from clip_jax.models import packing

    @jax.jit
    def count(ends: jax.Array) -> jax.Array:
        # A caption ends with its largest id, so one mark stands for it.
        tokens = jax.nn.one_hot(ends, context_length, dtype=np.int32)
        return jax.vmap(lambda batch: packing.place(batch, length).row.max() + 1)(tokens)

    return np.asarray(count(ids - 1))
