"""Masks of captions that are too long: what stays, how often, and from which random numbers."""

import json
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from etils import epath
from test_pipeline import Numbers, make, one, settings, take
from test_published import write_words
from tiny_tokenizer import write_tokenizer

from clip_jax.configs import default
from clip_jax.data import published, text_mask, tokenizer
from clip_jax.data.sources.base import Example
from clip_jax.data.tokenizer_base import Tokenizer
from clip_jax.errors import UserError
from clip_jax.training import validation

DRAWN = ("random", "shuffle", "block")
LENGTH = 5
LONG = "a cat cats a a cat s t cat"  # in every vocabulary of these tests more than LENGTH ids


def vocabulary(kind: str, folder: pathlib.Path, length: int) -> Tokenizer:
    if kind == "openai":
        return tokenizer.create("openai", length)
    if kind.startswith("huggingface"):
        left = kind.endswith("left")
        write_words(folder, start=left, padding_side="left" if left else "right")
        return published.create(epath.Path(folder), length)
    write_tokenizer(folder / "nine.model")
    name = f"{folder}/nine.model"
    return tokenizer.create(name if kind == "sentencepiece" else f"siglip:{name}", length)


KINDS = ("openai", "sentencepiece", "siglip", "huggingface", "huggingface, left")


@pytest.fixture(params=KINDS)
def tokens(request, tmp_path: pathlib.Path) -> Tokenizer:
    return vocabulary(request.param, tmp_path, LENGTH)


def encode(tokens: Tokenizer, name: str, text: str, seed: int) -> tuple[list[int], bool]:
    mask = text_mask.create(name, tokens)
    rng = np.random.default_rng(seed)
    row, shortened = tokens.encode(text, mask and (lambda ids, room: mask(rng, ids, room)))
    return row.tolist(), shortened


def whole(tokens: Tokenizer, text: str) -> list[int]:
    """All ids of a text, without special tokens."""
    (ids,) = tokens._pack([text])
    return np.frombuffer(ids, np.int32).tolist()


def is_subsequence(part: Sequence[int], of: Sequence[int]) -> bool:
    remaining = iter(of)
    return all(token in remaining for token in part)


@pytest.mark.parametrize("name", DRAWN)
def test_every_tokenizer(tokens: Tokenizer, name: str):
    """Special tokens stand where a caption that is cut has them; the other ids are its own."""
    cut = encode(tokens, "none", LONG, 0)[0]
    assert cut == tokens(LONG, truncate=True)[0].tolist()
    ids = whole(tokens, LONG)
    room = next(n for n in range(LENGTH, 0, -1) if is_subsequence(ids[:n], cut))
    first = next(i for i in range(LENGTH) if cut[i : i + room] == ids[:room])
    rows = set()
    for seed in range(60):
        row, shortened = encode(tokens, name, LONG, seed)
        assert shortened
        assert len(row) == LENGTH
        assert row[:first] + row[first + room :] == cut[:first] + cut[first + room :]
        kept = row[first : first + room]
        if name == "shuffle":
            assert not set(kept) - set(ids)
        elif name == "random":
            assert is_subsequence(kept, ids)
        else:
            assert any(kept == ids[i : i + room] for i in range(len(ids)))
        rows.add(tuple(row))
    assert len(rows) > 3


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("text", ["a", "a cat", ""])
def test_captions_that_fit_stay(tokens: Tokenizer, name: str, text: str):
    assert encode(tokens, name, text, 1) == encode(tokens, "none", text, 1)


def draws(name: str, count: int, length: int, room: int) -> np.ndarray:
    """Many draws of `room` of the ids 0, 1, ... length - 1."""
    mask = text_mask.create(name, tokenizer.create("openai", 77))
    assert mask is not None
    ids = np.arange(length, dtype=np.int32)
    rngs = map(np.random.default_rng, range(count))
    return np.stack([mask(rng, ids, room) for rng in rngs])


def assert_even(counts: np.ndarray) -> None:
    """By a chi-squared statistic below its mean plus five standard deviations."""
    expected, freedom = counts.mean(), counts.size - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5


def test_random_keeps_each_id_as_often():
    found = draws("random", 4000, 12, 5)
    assert (np.diff(found, axis=1) > 0).all()  # in order, none twice
    assert_even(np.bincount(found.ravel(), minlength=12))
    pairs = np.bincount(found[:, 0] * 12 + found[:, 4], minlength=144)
    assert pairs[0 * 12 + 11] > pairs[0 * 12 + 4] > 0  # not a block


def test_shuffle_puts_each_id_in_each_place_as_often():
    found = draws("shuffle", 6000, 6, 4)
    assert all(len(set(row)) == 4 for row in found.tolist())
    assert_even(np.stack([np.bincount(place, minlength=6) for place in found.T]).ravel())


def test_block_begins_anywhere():
    found = draws("block", 4000, 12, 5)
    assert (np.diff(found, axis=1) == 1).all()
    assert_even(np.bincount(found[:, 0], minlength=8))  # 0 to 7, both included


# ---- In a run ----------------------------------------------------------------------------------


class Photos(Numbers):
    """Images of noise, which crops tell apart; each caption is its 30 numbers from `index` on."""

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (20, 14, 3)).astype(np.uint8)
        text = " ".join(str(number % 10) for number in range(index, index + 30))
        return Example(image, one(text if index % 2 else "1 2"), labels=(0,), key=f"key {index}")


def batches(name: str, steps: int = 12, **options) -> dict[str, np.ndarray]:
    config = settings(text_mask=name, crop="resized", crop_scale=(0.3, 1.0))
    return take(make(Photos(16), config=config, **options), steps)


@pytest.mark.parametrize("name", DRAWN)
def test_rows_are_a_function_of_seed_and_position(name: str):
    found = batches(name)
    np.testing.assert_array_equal(found["tokens"], batches(name)["tokens"])
    later = batches(name, 4, start=4 * 8)
    np.testing.assert_array_equal(found["tokens"][32:], later["tokens"])
    halves = [batches(name, parts=2, part=part)["tokens"] for part in (0, 1)]
    joined = np.concatenate([half.reshape(12, 2, -1) for half in halves], axis=1)
    np.testing.assert_array_equal(found["tokens"], joined.reshape(found["tokens"].shape))
    assert (found["tokens"] != batches(name, seed=1)["tokens"]).any()


@pytest.mark.parametrize("name", DRAWN)
def test_other_tokens_in_another_epoch_and_the_same_crops(name: str):
    config = settings(text_mask=name, order="stored")
    tokens = take(make(Photos(16), config=config), 8)["tokens"].reshape(2, 16, -1)
    np.testing.assert_array_equal(tokens[0, ::2], tokens[1, ::2])  # those that fit
    assert (tokens[0, 1::2] != tokens[1, 1::2]).any(axis=1).sum() >= 7
    cut = batches("none")
    np.testing.assert_array_equal(batches(name)["image"], cut["image"])


def test_shortened_captions_are_counted():
    pipeline = make(Photos(16), config=settings(text_mask="block"))
    take(pipeline, 4)
    assert pipeline.truncated == 8


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"data.text_mask": "syntaks"}, r"data\.text_mask is 'syntaks'.*none, random, .*syntax"),
        (
            {"data.text_mask": "random", "objective": "captioning"},
            r"data\.text_mask is 'random'.*none with objective=captioning",
        ),
    ],
)
def test_wrong_settings(change: dict, match: str):
    config = default.smoke(default.get_config())
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=match):
        validation.validate(config)


# ---- By parts of speech ------------------------------------------------------------------------

TAGS = {"cat": "NN", "dogs": "NNS", "red": "JJ", "runs": "VBZ", "a": "DT", "the": "DT"}


class Tagger:
    """Tags by a table; counts how often it is asked."""

    asked = 0

    def tag(self, words: list[str]) -> list[tuple[str, str]]:
        self.asked += 1
        return [(word, TAGS.get(word, "IN")) for word in words]

    def tokenize(self, text: str) -> list[str]:
        return text.split()


def by_hand(words: list[str], room: int) -> list[str]:
    """Takes nouns, adjectives, verbs and the rest in turn until the room is full."""
    kept: set[int] = set()
    for start in ("NN", "JJ", "VB", ""):
        for place, word in enumerate(words):
            if len(kept) < room and TAGS.get(word, "IN").startswith(start):
                kept.add(place)
    return [words[place] for place in sorted(kept)]


def test_syntax_keeps_nouns_then_adjectives_then_verbs(monkeypatch):
    tagger = Tagger()
    monkeypatch.setattr(text_mask, "_nltk", lambda: (tagger, tagger))
    made = tokenizer.create("openai", 8)
    rng = np.random.default_rng(0)
    for _ in range(300):
        words = rng.choice([*TAGS, "of", "with"], rng.integers(1, 14)).tolist()
        row, _ = encode(made, "syntax", " ".join(words), 0)
        assert made.decode(row).split() == by_hand(words, 6), words
    tagger.asked = 0
    mask = text_mask.create("syntax", made)
    assert mask is not None
    for _ in range(2):
        made.encode("a red cat runs " * 5, lambda ids, room: mask(rng, ids, room))
    assert tagger.asked == 4  # once for each id


def test_syntax_names_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk.tag", None)
    text_mask._nltk.cache_clear()
    with pytest.raises(
        UserError, match=r"pip install nltk.*averaged_perceptron_tagger_eng.*random"
    ):
        text_mask.create("syntax", tokenizer.create("openai", 8))


def test_syntax_by_nltk(monkeypatch, tmp_path: pathlib.Path):
    """By its own code, with files in the form that its downloader leaves."""
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    text_mask._nltk.cache_clear()
    with pytest.raises(UserError, match=r"nltk\.downloader averaged_perceptron_tagger_eng"):
        text_mask.create("syntax", tokenizer.create("openai", 8))
    name = "averaged_perceptron_tagger_eng"
    folder = tmp_path / "taggers" / name
    folder.mkdir(parents=True)
    for part, content in (
        ("weights", {"bias": {"IN": 1.0}}),
        ("tagdict", TAGS),
        ("classes", sorted({*TAGS.values(), "IN"})),
    ):
        (folder / f"{name}.{part}.json").write_text(json.dumps(content))
    made = tokenizer.create("openai", 8)
    text = "the red cat, with a red cat of the dogs, runs"
    row, shortened = encode(made, "syntax", text, 0)
    assert made.decode(row) == "red cat red cat dogs runs"
    assert shortened
    text_mask._nltk.cache_clear()
