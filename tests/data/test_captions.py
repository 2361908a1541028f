"""Several captions of an image, their weights and their faults."""

import collections

import numpy as np
import pytest

from clip_jax.data.sources import captions
from clip_jax.data.sources.captions import Captions, Field
from clip_jax.errors import BadExample, UserError


@pytest.mark.parametrize(
    ("text_key", "fields"),
    [
        ("", ()),
        ("caption", (Field("caption", 1.0),)),
        ("txt:0.3, long:0.7", (Field("txt", 0.3), Field("long", 0.7))),
    ],
)
def test_fields(text_key, fields):
    assert captions.parse_fields(text_key) == fields


@pytest.mark.parametrize("text_key", ["a:b", "a:0", "a:-1", ":1", "a:inf", "a:nan"])
def test_senseless_fields(text_key):
    with pytest.raises(UserError, match=r"source\.text_key"):
        captions.parse_fields(text_key)


def test_weights_are_shared_within_a_field_and_by_what_is_there():
    values = [("one", 3.0), (["two", b"three", "  "], 1.0), (None, 9.0), ([], 9.0)]
    found = captions.collect(values, "k")
    assert found == Captions(("one", "two", "three"), (3.0, 0.5, 0.5))
    rng = np.random.default_rng(0)
    drawn = collections.Counter(captions.draw(found, 1, rng)[0] for _ in range(8000))
    for text, weight in zip(*found):
        np.testing.assert_allclose(drawn[text] / 8000, weight / 4, atol=0.02)


def test_no_choice_draws_nothing():
    rng, untouched = np.random.default_rng(0), np.random.default_rng(0)
    assert captions.draw(Captions(("one",), (1.0,)), 3, rng) == ["one"] * 3
    assert captions.draw(Captions((), ()), 2, rng) == ["", ""]
    assert rng.random() == untouched.random()


def test_several_are_drawn_without_replacement():
    """Sequential draws by weight: b first and c second with probability 1/4 x 1/3."""
    found, rng = Captions(("a", "b", "c"), (2.0, 1.0, 1.0)), np.random.default_rng(0)
    drawn = collections.Counter(tuple(captions.draw(found, 2, rng)) for _ in range(8000))
    assert all(one != other for one, other in drawn)
    for pair, chance in {("a", "b"): 1 / 4, ("b", "a"): 1 / 6, ("b", "c"): 1 / 12}.items():
        np.testing.assert_allclose(drawn[pair] / 8000, chance, atol=0.02)


def test_all_are_drawn_before_any_comes_twice():
    found, rng = Captions(("a", "b", "c"), (9.0, 1.0, 1.0)), np.random.default_rng(0)
    for _ in range(50):
        drawn = captions.draw(found, 8, rng)
        assert sorted(drawn[:3]) == sorted(drawn[3:6]) == ["a", "b", "c"]
        assert drawn[6] != drawn[7]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "no caption"),
        (7, "empty caption"),
        ([" ", "\n"], "empty caption"),
        (b"caf\xe9", "invalid UTF-8 caption"),
        ("x" * 2**20, "caption too long"),
    ],
)
def test_faults(value, reason):
    with pytest.raises(BadExample) as caught:
        captions.collect([(value, 1.0)], "key 7")
    assert (caught.value.reason, caught.value.key) == (reason, "key 7")
    if reason in ("no caption", "empty caption"):
        assert captions.collect([(value, 1.0)], "k", required=False) == Captions((), ())


def test_files_beside_an_image():
    record = b'{"caption": ["a", "b"], "alt": "c"}'
    assert captions.read_files(b"t", record, (), "k").texts == ("t",)
    assert captions.read_files(None, record, (), "k").texts == ("a", "b")
    fields = captions.parse_fields("txt:2,alt:1,caption:4")
    assert captions.read_files(b"t", record, fields, "k") == Captions(
        ("t", "c", "a", "b"), (2.0, 1.0, 2.0, 2.0)
    )
    assert captions.read_files(None, record, fields, "k").texts == ("c", "a", "b")
