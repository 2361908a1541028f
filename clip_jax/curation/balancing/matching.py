"""Finds queries in captions, as whole words in sequence.

Both are normalised in the same way: NFKC, lower case, and anything but letters, marks and digits
counts as a space. So "T-shirt" and "t shirt" are the same query, which "The dog's T-Shirt!"
contains. "category" does not contain "cat". Text without spaces between words, such as Chinese, has
to be segmented before.

As matches begin and end at words, the automaton steps over words, not characters: a trie of word
numbers, traversed from all positions of a whole batch at once.
"""

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

pc: Any = pyarrow.compute  # makes its functions at import, unseen by type checkers

_SEPARATORS = r"[^\pL\pM\pN ]+"


def normalise(texts: pa.Array) -> pa.Array:
    """Normalises texts: words in lower case, with one or more spaces between them.

    Args:
      texts: string [n], no nulls.

    Returns:
      string [n]; "" where there is no word.
    """
    texts = pc.utf8_lower(_compose(texts))
    return pc.utf8_trim(pc.replace_substring_regex(texts, _SEPARATORS, " "), " ")


def _compose(texts: pa.Array) -> pa.Array:
    # Not by pyarrow, which before version 26 does not compose accents with their letters.
    others = pc.invert(pc.string_is_ascii(texts))
    composed = [unicodedata.normalize("NFKC", text) for text in texts.filter(others).to_pylist()]
    return pc.replace_with_mask(texts, others, pa.array(composed, pa.string()))


def split(texts: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Splits normalised texts into words.

    Args:
      texts: string [n], from `normalise`.

    Returns:
      The offsets of the words of each text, int32 [n + 1]; all words, string. A text without words
      has one that is "".
    """
    words = pc.utf8_split_whitespace(texts)
    return words.offsets.to_numpy(), words.values


class Matcher:
    """Finds queries.

    Attributes:
      size: number of queries.
    """

    def __init__(self, queries: Sequence[str] | pa.Array):
        """Builds the trie.

        Args:
          queries: normalised with single spaces, distinct, at least one, none "".
        """
        queries = pa.array(queries, pa.string())
        offsets, words = split(queries)
        self.size = len(queries)
        self._words = pc.unique(words)
        numbers = self._numbers(words)
        lengths = np.diff(offsets)
        # By depth: the query that ends in a state (-1: none), and the edges to the next states, as
        # sorted keys of (state, word). The states of the first depth are the words.
        self._ends: list[np.ndarray] = []
        self._edges: list[np.ndarray] = []
        left, states, size = np.arange(self.size), numbers[offsets[:-1]], len(self._words)
        while len(left):
            depth = len(self._ends) + 1
            whole = lengths[left] == depth
            ends = np.full(size, -1, np.int64)
            ends[states[whole]] = left[whole]
            self._ends.append(ends)
            left, states = left[~whole], states[~whole]
            keys = self._keys(states, numbers[offsets[left] + depth])
            edges, states = np.unique(keys, return_inverse=True)
            self._edges.append(edges)
            size = len(edges)

    def __call__(self, captions: pa.Array) -> pa.ListArray:
        """Returns the queries in each caption.

        Args:
          captions: string [n], from `normalise`.

        Returns:
          list of int32 [n]: positions in `queries`, rising, each once per caption.
        """
        offsets, words = split(captions)
        numbers = self._numbers(words)
        row = np.repeat(np.arange(len(captions)), np.diff(offsets))
        end = offsets[1:][row]
        start = np.flatnonzero(numbers >= 0)
        state = numbers[start]
        found = []  # elements are row * count + query
        for depth, (ends, edges) in enumerate(zip(self._ends, self._edges), 1):
            query = ends[state]
            hit = query >= 0
            found.append(row[start[hit]] * self.size + query[hit])
            inside = start + depth < end[start]
            start, state = start[inside], state[inside]
            start, state = self._advance(edges, start, state, numbers[start + depth])
        return self._lists(np.sort(np.concatenate(found)), len(captions))

    def _advance(
        self, edges: np.ndarray, start: np.ndarray, state: np.ndarray, word: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the starts of the walks that continue with `word`, and their next states."""
        known = word >= 0
        if not len(edges) or not known.any():
            return start[:0], state[:0]
        keys = self._keys(state[known], word[known])
        target = np.minimum(np.searchsorted(edges, keys), len(edges) - 1)
        continues = edges[target] == keys
        return start[known][continues], target[continues]

    def _lists(self, found: np.ndarray, rows: int) -> pa.ListArray:
        """Converts sorted row * count + query, with repetitions, to lists of queries by row."""
        first = np.ones(len(found), bool)
        first[1:] = found[1:] != found[:-1]
        row, query = np.divmod(found[first], self.size)
        offsets = np.zeros(rows + 1, np.int32)
        np.cumsum(np.bincount(row, minlength=rows), out=offsets[1:])
        return pa.ListArray.from_arrays(offsets, query.astype(np.int32))

    def _keys(self, state: np.ndarray, word: np.ndarray) -> np.ndarray:
        return state * len(self._words) + word

    def _numbers(self, words: pa.Array) -> np.ndarray:
        """Returns the numbers of words, int64; -1: in no query."""
        # Captions repeat words, so each word is looked up once per batch.
        coded = words.dictionary_encode()
        known = pc.fill_null(pc.index_in(coded.dictionary, self._words), -1)
        return known.to_numpy().astype(np.int64)[coded.indices.to_numpy()]
