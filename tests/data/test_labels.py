"""The numbers of classes, against the numbers themselves."""

import decimal
import math

import numpy as np
import pytest

from clip_jax.data.sources import labels
from clip_jax.errors import UserError

N = 12
WANTED = [(i,) for i in range(N)]
NUMBERS = {
    "integers": list(range(N)),
    "floats": [float(i) for i in range(N)],
    "texts": list(map(str, range(N))),
    "texts of floats": [f"{i}.0" for i in range(N)],
    "exponents": [f"{i:.3e}" for i in range(N)],
    "leading zeros": [f"{i:03}" for i in range(N)],
    "bytes": [b"%d" % i for i in range(N)],
    "with spaces": [f" {i}\n" for i in range(N)],
    "NumPy": list(np.arange(N, dtype=np.uint8)),
    "NumPy floats": list(np.arange(N, dtype=np.float32)),
    "arrays": [np.array([i]) for i in range(N)],
    "decimals": [decimal.Decimal(i) for i in range(N)],
    "lists": [[float(i)] for i in range(N)],
    "mixed spellings": [0, "1", 2.0, "3.0", *range(4, N)],
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_whole_number_is_its_own_id(name: str):
    found, names = labels.number_labels(NUMBERS[name])
    assert [found[i] for i in range(N)] == WANTED
    assert names == ()
    assert not found.by_name


def test_gaps_ones_and_missing_labels():
    found, names = labels.number_labels([3, 900, "", None, math.nan, -1, 70_000])
    assert [found[i] for i in range(7)] == [(3,), (900,), (), (), (), (), (70_000,)]
    assert names == ()
    found, _ = labels.number_labels([{"id": 3}, [[1], 2], 3])  # two odd rows
    assert [found[i] for i in range(3)] == [(), (2,), (3,)]
    found, _ = labels.number_labels([False, True, True])
    assert [found[i] for i in range(3)] == [(0,), (1,), (1,)]


def test_names_that_are_numbers_are_sorted_by_their_value():
    found, names = labels.number_names([[str(i)] for i in reversed(range(1000))])
    assert names == tuple(map(str, range(1000)))
    assert [found[i] for i in (0, 1, 999)] == [(999,), (998,), (0,)]
    assert labels.number_labels(["b", 10, 2.0, "a"])[1] == ("2", "10", "a", "b")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5, 1.0], "0.5 is no whole number"),
        (["1.5", "2"], "'1.5' is no whole number"),
        ([math.inf, 1], "inf is no whole number"),
        ([-2, 1], "-2 is negative"),
        ([10**12, 1], "too large"),
        (["1e300".replace("e", ".0e"), 1], "too large"),
        (["7", "007"], "'007' and '7' are the same number"),
        ([[True, False], [False, True]], "list of true and false"),
        ([[[1], [2]], {"id": 3}], "misspelt"),
        ([-1, -1], "All labels"),
        ([None, ""], "misspelt"),
    ],
)
def test_what_is_no_class_is_refused(values, message: str):
    with pytest.raises(UserError, match=message):
        labels.number_labels(values)
