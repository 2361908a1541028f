"""Random selection of pairs: each query keeps about as many as its limit.

A pair is kept if at least one of its queries keeps it. Whether a query keeps a pair depends only on
the seed, the shard, the row and the query, so that the choice is the same on any number of machines
and in any order.
"""

import hashlib

import numpy as np
from jaxtyping import Float64, Int

# Steps and multipliers of SplitMix64 (Steele, Lea, Flood 2014).
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def keep_probabilities(
    counts: Int[np.ndarray, " queries"], per_query: int
) -> Float64[np.ndarray, " queries"]:
    """Returns the probability that a query keeps a pair it matches: min(1, per_query / count).

    Args:
      counts: number of pairs that match each query.
      per_query: number of pairs that a query keeps on average, if it has more.
    """
    return np.minimum(1.0, per_query / np.maximum(counts, 1))


def draws(
    seed: int, shard: str, rows: Int[np.ndarray, " n"], queries: Int[np.ndarray, " n"]
) -> Float64[np.ndarray, " n"]:
    """Draws independent uniform numbers in [0, 1).

    Args:
      seed: PRNG seed of the selection.
      shard: unique name of the shard.
      rows: row of each pair in the shard.
      queries: the query that matches each pair.
    """
    digest = hashlib.blake2b(f"{seed}/{shard}".encode(), digest_size=8).digest()
    start = np.frombuffer(digest, "<u8")
    bits = _mix(_mix(start + rows.astype(np.uint64) * _STEP) + queries.astype(np.uint64) * _STEP)
    return (bits >> np.uint64(11)) * 2.0**-53


def _mix(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * _FIRST
    bits = (bits ^ (bits >> np.uint64(27))) * _SECOND
    return bits ^ (bits >> np.uint64(31))
