"""Counts frequent words of a large text, and pairs of neighbouring words.

The words are counted in memory (English Wikipedia has some ten million different ones: about 1.5
GB). The pairs, of frequent words only, are counted by an external sort: sorted runs on disk, merged
at the end.
"""

import itertools
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float64, Int, Int64

from clip_jax.curation.balancing import matching
from clip_jax.curation.balancing.matching import pc

# The end of a clause: words on its two sides are no pair.
_BREAKS = r"[.,;:!?()\[\]{}\"“”\n\r\t]+"
RUN = 2**24  # pairs sorted at a time: 128 MB

Texts = Callable[[], Iterator[pa.Array]]  # reads the whole text again at every call; string [n]


def count_words(texts: Texts) -> Counter[str]:
    """Counts each normalised word."""
    counts: Counter[str] = Counter()
    for batch in texts():
        _, words = matching.split(matching.normalise(batch))
        found = words.value_counts()
        counts.update(
            dict(zip(found.field("values").to_pylist(), found.field("counts").to_pylist()))
        )
    del counts[""]
    return counts


def count_pairs(
    texts: Texts, words: list[str], min_count: int, run: int = RUN
) -> Iterator[tuple[Int64[np.ndarray, "n 2"], Int64[np.ndarray, " n"]]]:
    """Counts pairs of words that follow each other within a clause.

    Args:
      texts: the text.
      words: the words to count pairs of, distinct.
      min_count: least count of a pair.
      run: number of pairs to sort in memory at a time.

    Yields:
      Pairs, as positions in `words`, and the count of each; every pair once, sorted.
    """
    with tempfile.TemporaryDirectory() as directory:
        runs = list(_sorted_runs(_pairs(texts, words), run, Path(directory)))
        for keys, counts in _merge(runs, run):
            often = counts >= min_count
            yield np.stack(np.divmod(keys[often], len(words)), 1), counts[often]


def _pairs(texts: Texts, words: list[str]) -> Iterator[np.ndarray]:
    """Yields pairs of neighbours, as first * len(words) + second, in order of appearance."""
    known = pa.array(words, pa.string())
    for batch in texts():
        clauses = pc.list_flatten(pc.split_pattern_regex(batch, _BREAKS))
        offsets, found = matching.split(matching.normalise(clauses))
        numbers = pc.fill_null(pc.index_in(found, known), -1).to_numpy().astype(np.int64)
        first, second = numbers[:-1], numbers[1:]
        joined = (first >= 0) & (second >= 0)
        joined[offsets[1:-1] - 1] = False  # the last word of a clause and the first of the next
        yield first[joined] * len(words) + second[joined]


def _sorted_runs(
    batches: Iterator[np.ndarray], run: int, directory: Path
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields distinct keys, sorted, and their counts, of every `run` keys or so; on disk."""
    waiting: list[np.ndarray] = []
    size = written = 0
    for batch in itertools.chain(batches, [None]):
        if batch is not None:
            waiting.append(batch)
            size += len(batch)
        if size >= run or (batch is None and size):
            yield _spill(np.concatenate(waiting), directory / str(written))
            waiting.clear()
            size, written = 0, written + 1


def _spill(keys: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Sorts and counts keys; returns keys and counts, mapped from disk."""
    spilt = []
    for kind, values in zip(("keys", "counts"), np.unique(keys, return_counts=True)):
        file = path.with_suffix(f".{kind}.npy")
        np.save(file, values)
        spilt.append(np.load(file, mmap_mode="r"))
    return spilt[0], spilt[1]


def _merge(
    runs: list[tuple[np.ndarray, np.ndarray]], size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Merges sorted runs and adds their counts, some `size` entries at a time."""
    if not runs:
        return
    # Every run has equally many entries between two of its samples, so that all runs together have
    # about `size` entries between every 64th of all samples.
    samples = np.sort(np.concatenate([keys[:: max(1, size // 64)] for keys, _ in runs]))
    bounds = [-1, *np.unique(samples[64::64]).tolist(), np.iinfo(np.int64).max]
    for low, high in itertools.pairwise(bounds):
        slices = [slice(*np.searchsorted(keys, (low, high))) for keys, _ in runs]
        keys = np.concatenate([keys[s] for (keys, _), s in zip(runs, slices)])
        counts = np.concatenate([counts[s] for (_, counts), s in zip(runs, slices)])
        distinct, place = np.unique(keys, return_inverse=True)
        yield distinct.astype(np.int64), np.bincount(place, counts, len(distinct)).astype(np.int64)


def mutual_information(
    pair: Int[np.ndarray, " n"],
    first: Int[np.ndarray, " n"],
    second: Int[np.ndarray, " n"],
    words: int,
) -> Float64[np.ndarray, " n"]:
    """Computes the pointwise mutual information of pairs of words, in bits.

    Args:
      pair: count of each pair.
      first: count of the first word of each.
      second: count of the second word of each.
      words: number of words in the text.
    """
    return np.log2(pair) - np.log2(first) - np.log2(second) + math.log2(words)
