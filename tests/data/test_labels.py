"""Numbers and names of classes as files spell them, against the numbers that were meant."""

import numpy as np
import pytest

from clip_jax.data.sources.labels import number_labels, number_names
from clip_jax.errors import UserError

NUMBERS = [*range(12), 3]


@pytest.mark.parametrize(
    "spelt",
    [
        int,
        float,
        str,
        "{}.0".format,
        "{}.".format,
        "{:03}".format,
        " {} ".format,
        np.int8,
        np.float32,
        lambda n: str(n).encode(),
        lambda n: [n],
    ],
)
def test_numbers_stay_what_they_are(spelt):
    """As text, 10 would sort before 2; pandas writes 3.0 where a cell of the column is empty."""
    labels, names = number_labels([spelt(n) for n in NUMBERS])
    assert [labels[i] for i in range(len(labels))] == [(n,) for n in NUMBERS]
    assert names == ()


def test_no_label():
    labels, _ = number_labels([None, float("nan"), np.float64("nan"), -1, "-1", [], 2.0, [3, None]])
    found = [labels[i] for i in range(len(labels))]
    assert found == [(), (), (), (), (), (), (2,), (3,)]


def test_one_number_in_two_spellings_is_one_class():
    labels, _ = number_labels([["1", "01", 1.0], True, False])
    assert [labels[i] for i in range(3)] == [(1,), (1,), (0,)]


@pytest.mark.parametrize("value", [0.5, float("inf"), 2**31, 1e12])
def test_numbers_that_are_no_class_are_refused(value):
    with pytest.raises(UserError, match="no whole number from 0 to 2,147,483,647"):
        number_labels([1, value])


def test_names():
    labels, names = number_labels(["cat", 3.0, "3", ["ant", "cat"], {"a": 1}, [["cat"]]])
    assert names == ("3", "ant", "cat")
    assert [labels[i] for i in range(6)] == [(2,), (0,), (0,), (1, 2), (), ()]


@pytest.mark.parametrize(
    ("folders", "expected", "names"),
    [
        ([str(n) for n in range(12)], range(12), [str(n) for n in range(12)]),
        ([f"{n:03}" for n in (10, *range(10))], [10, *range(10)], None),
        (["1", "2", "3"], [1, 2, 3], ["0", "1", "2", "3"]),  # counted from 1
        (["3", "10"], [1, 0], ["10", "3"]),  # numbers as names: most would have no image
        (["1", "01"], [1, 0], ["01", "1"]),
        (["1", "one"], [0, 1], ["1", "one"]),
        (["20231105", "20231106"], [0, 1], ["20231105", "20231106"]),
        (["-1", "1"], [0, 1], ["-1", "1"]),
    ],
)
def test_folders(folders, expected, names):
    labels, found = number_names([[folder] for folder in folders])
    assert [labels[i] for i in range(len(labels))] == [(n,) for n in expected]
    assert [found[n] for n in expected] == folders  # a label and its name go together
    assert names is None or list(found) == names
