"""Numbers, durations and tables as text."""

import pytest

from clip_jax.common import formatting


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0s"),
        (42.4, "42s"),
        (59.6, "1m 00s"),
        (187, "3m 07s"),
        (3599.7, "1h 00m"),
        (7505, "2h 05m"),
        (86_400 * 4 + 3600 * 3, "4d 03h"),
    ],
)
def test_format_seconds(seconds: float, shown: str):
    assert formatting.format_seconds(seconds) == shown


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(0, "0.0 %"), (0.9584, "95.8 %"), (1, "100.0 %"), (2e-4, "0.02 %"), (float("nan"), "–")],
)
def test_percent(fraction, text):
    assert formatting.percent(fraction).replace("\xa0", " ") == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (2.5e-4, "2.5e-4"),
        (1191.2, "1191"),
        (9999.6, "10k"),
        (1_234_567, "1.235M"),
        (2.5e12, "2.5T"),
        (9.99e15, "9990T"),
        (-2.08e19, "-2.08e19"),
        (float("inf"), "not finite"),
    ],
)
def test_short(value, text):
    assert formatting.short(value) == text


def test_aligned():
    rows = [("name", "count"), ("a", "7"), ("long name", "12")]
    assert formatting.aligned(rows, "<>").splitlines() == [
        "name       count",
        "a              7",
        "long name     12",
    ]
