"""Finds near-duplicates of earlier images: exact search among perceptual hashes or embeddings.

In the order of the set, an image is dropped if one that is kept lies within the threshold. So every
dropped image has a near-duplicate that is kept, however long a chain of similar images is.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64, Shaped, UInt8, UInt64

BITS = 64  # bits of a hash
# The features of an image: perceptual hash of its greys; mean red, green and blue of 3 x 3 fields.
SIGNATURE = np.dtype([("hash", "<u8"), ("colours", "u1", 27)])
_BLOCK = 4096  # embeddings compared with as many others at a time
_MAX_TABLES = 1000

IsPair = Callable[[Int64[np.ndarray, " p"], Int64[np.ndarray, " p"]], Bool[np.ndarray, " p"]]


class Matches(NamedTuple):
    """The match of each image.

    Attributes:
      kept: index of the image that is kept in place of this one; -1: this one is kept.
      distance: distance of the two; 0 where the image is kept.
    """

    kept: Int64[np.ndarray, " n"]
    distance: Float32[np.ndarray, " n"]


class Pairs(NamedTuple):
    """Pairs of close hashes: indices of both, and number of differing bits."""

    first: Int64[np.ndarray, " p"]
    second: Int64[np.ndarray, " p"]
    distance: UInt8[np.ndarray, " p"]


def match_signatures(
    signatures: Shaped[np.ndarray, " n"],
    threshold: int,
    tolerance: int,
    others: Shaped[np.ndarray, " m"] | None = None,
) -> Matches:
    """Matches images whose hash and colours are close to those of an image that is kept.

    Args:
      signatures: `SIGNATURE` [n].
      threshold: number of bits of the hash that may differ.
      tolerance: levels of 255 by which each colour may differ.
      others: `SIGNATURE` [m]. All of these are kept, and the images are compared with them only;
        None: the images are compared with each other.
    """
    firsts, numbers = _distinct(signatures)
    if others is None:
        kept_firsts, match = firsts, _keep_first
        reference = unique = signatures[firsts]
    else:
        kept_firsts, match = _distinct(others)[0], _nearest
        unique, reference = signatures[firsts], others[kept_firsts]

    def colours_match(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        first, second = (x["colours"].astype(np.int16) for x in (unique[rows], reference[columns]))
        return np.abs(first - second).max(axis=1) <= tolerance

    against = None if others is None else reference["hash"]
    matches = match(len(unique), close_pairs(unique["hash"], threshold, against, colours_match))
    kept = np.where(matches.kept >= 0, kept_firsts[matches.kept], -1)
    distance = matches.distance[numbers]
    if others is None:  # exact repeats are dropped too
        kept = np.where(kept >= 0, kept, firsts)[numbers]
        return Matches(np.where(kept == np.arange(len(kept)), -1, kept), distance)
    return Matches(kept[numbers], distance)


def close_pairs(
    hashes: UInt64[np.ndarray, " n"],
    threshold: int,
    others: UInt64[np.ndarray, " m"] | None = None,
    is_pair: IsPair | None = None,
) -> Pairs:
    """Finds all pairs of hashes that differ in at most `threshold` bits, each once.

    The bits are cut into p parts. Two hashes that differ in t bits agree in at least p - t of the
    parts, so one look-up table for each choice of p - t parts finds every such pair. The other
    pairs that it finds are excluded by counting bits. p is chosen by the number of hashes. With n
    of them, a table costs a sort and, where hashes are spread evenly,
    n^2 / 2^(64 (p - t) / p + 1) comparisons: for t = 6, 28 tables of 16 bits at a million. Memory:
    some 60 bytes per hash, and 17 per pair.

    Args:
      hashes: the hashes.
      threshold: number of bits, below 64.
      others: other hashes, for pairs of one from each; None: pairs among `hashes`, the earlier
        one first.
      is_pair: decides on pairs, given the indices of both hashes; None: all are pairs.
    """
    against = hashes if others is None else others
    masks = _masks(_parts(len(hashes), len(against), threshold))
    nothing = np.empty(0, np.int64)
    found = [(nothing, nothing, np.empty(0, np.uint8))]
    for chosen in itertools.combinations(range(len(masks)), len(masks) - threshold):
        mask = np.bitwise_or.reduce(masks[list(chosen)])
        # A pair that agrees in more parts is in several tables; only the first of them counts.
        earlier = [masks[part] for part in range(chosen[-1]) if part not in chosen]
        for rows, columns in _meetings(hashes & mask, None if others is None else others & mask):
            differing = hashes[rows] ^ against[columns]
            near = np.bitwise_count(differing) <= threshold
            for part in earlier:
                near &= differing & part != 0
            rows, columns, differing = rows[near], columns[near], differing[near]
            if is_pair is not None:
                near = is_pair(rows, columns)
                rows, columns, differing = rows[near], columns[near], differing[near]
            found.append((rows, columns, np.bitwise_count(differing)))
    return Pairs(*map(np.concatenate, zip(*found)))


def match_embeddings(
    embeddings: Float[np.ndarray, "n d"],
    threshold: float,
    others: Float[np.ndarray, "m d"] | None = None,
) -> Matches:
    """Matches images whose embedding has a cosine of at least `threshold` with that of one kept.

    All images are compared with all that are kept, in blocks: n^2 d multiplications at most, and
    memory for three blocks whatever n.

    Args:
      embeddings: embeddings of any norm; one of zeros is similar to no other. May be mapped from a
        file.
      threshold: least cosine, above 0.
      others: embeddings of the other set, as for `match_signatures`.
    """
    size = len(embeddings)
    kept, similarity = np.full(size, -1), np.zeros(size, np.float32)
    survivors = np.arange(0 if others is None else len(others))
    reference = embeddings if others is None else others
    for start in range(0, size, _BLOCK):
        block = _unit(embeddings[start : start + _BLOCK])
        best, cosine = _best(block, reference, survivors, threshold)
        if others is None:
            _match_within(block, start, best, cosine, threshold)
            survivors = np.append(survivors, start + np.flatnonzero(best < 0))
        kept[start : start + _BLOCK], similarity[start : start + _BLOCK] = best, cosine
    return Matches(kept, np.where(kept < 0, 0, 1 - similarity).astype(np.float32))


def _distinct(signatures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first index of each distinct signature, rising; and each one's place in these."""
    plain = signatures.view(f"V{signatures.itemsize}")
    _, first, inverse = np.unique(plain, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[inverse]


def _keep_first(count: int, pairs: Pairs) -> Matches:
    """Drops each image, in order, if one already kept is close; matches it with the closest."""
    kept, distance = np.full(count, -1), np.zeros(count, np.float32)
    order = np.lexsort((pairs.first, pairs.distance, pairs.second))
    for first, second, bits in zip(*(column[order].tolist() for column in pairs)):
        if kept[first] < 0 and kept[second] < 0:
            kept[second], distance[second] = first, bits
    return Matches(kept, distance)


def _nearest(count: int, pairs: Pairs) -> Matches:
    """Matches each first image of a pair with its closest second one."""
    kept, distance = np.full(count, -1), np.zeros(count, np.float32)
    order = np.lexsort((pairs.second, pairs.distance, pairs.first))[::-1]
    # Where an index repeats, the last assignment holds.
    kept[pairs.first[order]] = pairs.second[order]
    distance[pairs.first[order]] = pairs.distance[order]
    return Matches(kept, distance)


def _parts(count: int, others: int, threshold: int) -> int:
    """Returns the number of parts with the least work, a sort taken as 5 comparisons per hash."""

    def work(parts: int) -> float:
        tables = math.comb(parts, threshold)
        meetings = count * others / 2 ** (BITS * (parts - threshold) / parts)
        return tables * (5 * (count + others) + meetings)

    choices = range(threshold + 1, BITS + 1)
    few = [parts for parts in choices if math.comb(parts, threshold) <= _MAX_TABLES]
    return min(few or choices[:1], key=work)


def _masks(parts: int) -> np.ndarray:
    """The bits of each part, uint64 [parts]; all parts are of almost equal size."""
    bounds = [BITS * part // parts for part in range(parts + 1)]
    return np.array([(1 << high) - (1 << low) for low, high in itertools.pairwise(bounds)], "u8")


def _meetings(
    keys: np.ndarray, others: np.ndarray | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields indices of equal keys; without `others` among `keys`, the earlier one first."""
    table = keys if others is None else others
    order = np.argsort(table, kind="stable")
    table = table[order]
    if others is None:
        rows, start = order, np.arange(1, len(table) + 1)
        stop = np.searchsorted(table, table, "right")
    else:
        rows, start = np.arange(len(keys)), np.searchsorted(table, keys, "left")
        stop = np.searchsorted(table, keys, "right")
    while len(rows):
        more = start < stop
        rows, start, stop = rows[more], start[more], stop[more]
        yield rows, order[start]
        start = start + 1


def _best(
    block: np.ndarray, reference: np.ndarray, survivors: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each row the index of the most similar survivor, -1: too low; and the cosine."""
    best, cosine = np.full(len(block), -1), np.zeros(len(block), np.float32)
    for start in range(0, len(survivors), _BLOCK):
        indices = survivors[start : start + _BLOCK]
        products = block @ _unit(reference[indices]).T
        column = products.argmax(axis=1)
        highest = products[np.arange(len(block)), column]
        better = (highest >= threshold) & (highest > cosine)
        best[better], cosine[better] = indices[column[better]], highest[better]
    return best, cosine


def _match_within(
    block: np.ndarray, start: int, best: np.ndarray, cosine: np.ndarray, threshold: float
) -> None:
    """Matches the rows of a block in order, as `_keep_first`; updates `best` and `cosine`."""
    products = np.tril(block @ block.T, -1)
    for row in np.flatnonzero((products >= threshold).any(axis=1)):
        against = np.where(best[:row] < 0, products[row, :row], 0)
        column = int(against.argmax())
        if against[column] >= threshold and against[column] > cosine[row]:
            best[row], cosine[row] = start + column, against[column]


def _unit(embeddings: np.ndarray) -> np.ndarray:
    values = np.asarray(embeddings, np.float32)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
