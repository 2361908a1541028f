"""Masks of captions against open_clip's own functions, given the same draws."""

import numpy as np
import pytest
from parity import torch  # or skips

from clip_jax.data import text_mask, tokenizer

open_clip_tokenizer = pytest.importorskip("open_clip.tokenizer")

WORDS = "a photo of two black cats, asleep on the sofa beside an open window's curtain; it's 1999!"


def texts(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.permutation(WORDS.split())[: rng.integers(18)]) for _ in range(count)]


@pytest.mark.parametrize("length", [4, 8, 16])
@pytest.mark.parametrize(
    ("ours", "theirs"), [("random", "random"), ("shuffle", "shuffle"), ("block", "simple")]
)
def test_masks(ours: str, theirs: str, length: int, monkeypatch):
    there = open_clip_tokenizer.SimpleTokenizer(context_length=length, reduction_mask=theirs)
    here = tokenizer.create("openai", length)
    mask = text_mask.create(ours, here)
    assert mask is not None
    monkeypatch.setattr(torch, "randperm", lambda n: torch.tensor(draws().permutation(n)))
    monkeypatch.setattr(
        open_clip_tokenizer.random, "randint", lambda a, b: int(draws().integers(a, b + 1))
    )

    def draws() -> np.random.Generator:
        """The draws that `mask` makes for the current caption, as open_clip's own."""
        return np.random.default_rng([*text.encode()]).spawn(1)[0]

    def shorten(ids: np.ndarray, room: int) -> np.ndarray:
        return mask(np.random.default_rng([*text.encode()]), ids, room)

    shortened = 0
    for text in texts(200):
        row, cut = here.encode(text, shorten)
        np.testing.assert_array_equal(row, there([text])[0].numpy(), text)
        shortened += cut
    assert 60 < shortened < 200
