"""Captions that are longer than the context, shortened for training as CLIPA does it.

"An Inverse Scaling Law for CLIP Training" (Li et al. 2023, arXiv:2305.07017) trains on 8 to 16
tokens a caption, and compares ways to choose them.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from clip_jax.data.tokenizer_base import Ids, Tokenizer
from clip_jax.errors import UserError

# Chooses as many ids as there is room for from a caption with more.
Mask = Callable[[np.random.Generator, Ids, int], Ids]

# Kept first by "syntax": nouns, adjectives, verbs, by the beginning of the Penn Treebank's tag.
_CLASSES = ("NN", "JJ", "VB")


def create(name: str, tokenizer: Tokenizer) -> Mask | None:
    """Returns a mask of captions; None: their ends are cut off.

    Args:
      name: one of `choices.TEXT_MASKS`.
      tokenizer: encodes the captions.

    Raises:
      UserError: the mask is "syntax", and NLTK or its tagger is missing.
    """
    if name == "none":
        return None
    if name == "syntax":
        return _Syntax(tokenizer)
    # A generator of its own: whatever a caption draws, its image is cropped as without a mask.
    return lambda rng, ids, room: _DRAWN[name](rng.spawn(1)[0], ids, room)


def _random(rng: np.random.Generator, ids: Ids, room: int) -> Ids:
    """Draws ids without replacement and keeps their order."""
    return ids[np.sort(rng.permutation(len(ids))[:room])]


def _shuffle(rng: np.random.Generator, ids: Ids, room: int) -> Ids:
    """Draws ids without replacement, in the order of the draw."""
    return ids[rng.permutation(len(ids))[:room]]


def _block(rng: np.random.Generator, ids: Ids, room: int) -> Ids:
    """Draws neighbouring ids; every place is as likely, the first and the last too."""
    start = int(rng.integers(len(ids) - room + 1))
    return ids[start : start + room]


_DRAWN: Mapping[str, Mask] = {"random": _random, "shuffle": _shuffle, "block": _block}


class _Syntax:
    """Keeps nouns before adjectives before verbs before the rest, in the order of the caption.

    As in CLIPA's own training, each id is tagged by its text alone, not by its neighbours: a tag
    is looked up once in a run. Of ids of one class the first ones stay.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tagger, self._words = _nltk()
        self._ranks: dict[int, int] = {}

    def __call__(self, rng: np.random.Generator, ids: Ids, room: int) -> Ids:
        del rng
        ranks = [self._rank(int(token)) for token in ids]
        return ids[np.sort(np.argsort(ranks, kind="stable")[:room])]

    def _rank(self, token: int) -> int:
        if token not in self._ranks:
            words = self._words.tokenize(self._tokenizer.piece(token))
            tag = self._tagger.tag(words)[-1][1] if words else ""
            self._ranks[token] = next(
                (rank for rank, start in enumerate(_CLASSES) if tag.startswith(start)),
                len(_CLASSES),
            )
        return self._ranks[token]


@functools.cache
def _nltk() -> tuple[Any, Any]:
    """Returns NLTK's tagger of English and its splitter of words.

    Raises:
      UserError: NLTK or the tagger is missing.
    """
    try:
        from nltk.tag import PerceptronTagger
        from nltk.tokenize import NLTKWordTokenizer

        return PerceptronTagger(), NLTKWordTokenizer()
    except (ImportError, LookupError):
        raise UserError(
            "data.text_mask='syntax' needs NLTK and its tagger of English. On every host, run "
            "`pip install nltk`, then `python -m nltk.downloader averaged_perceptron_tagger_eng`; "
            "or take another mask, as in --config.data.text_mask=random."
        ) from None
