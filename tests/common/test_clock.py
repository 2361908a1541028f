"""Durations and what is due."""

import pytest

from clip_jax.common import clock
from clip_jax.errors import UserError

RUN = {"batch_size": 32, "examples_per_epoch": 1000}


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        ("500 steps", 500),
        ("1 step", 1),
        ("1_000 steps", 1000),
        ("1,000 steps", 1000),
        ("0 steps", 0),
        ("3200 examples", 100),
        ("12.8e9 examples", 400_000_000),
        ("1 example", 1),  # rounds to 0, but is not nothing
        ("50 examples", 2),  # 1.56
        ("32 epochs", 1000),
        ("1 epoch", 31),  # 31.25
        ("0.5 epochs", 16),  # 15.6
    ],
)
def test_to_steps(duration: str, steps: int):
    assert clock.to_steps(duration, **RUN) == steps


@pytest.mark.parametrize(
    ("duration", "steps"),
    [("5 percent", 20), ("100 percent", 400), ("0.1 percent", 1), ("0 percent", 0)],
)
def test_percent_of_the_run(duration: str, steps: int):
    assert clock.to_steps(duration, **RUN, total_steps=400) == steps


def test_the_paper():
    """32 epochs of 400 million pairs in batches of 32,768 (paper, section 2.5 and Table 18)."""
    steps = clock.to_steps("32 epochs", batch_size=32_768, examples_per_epoch=400_000_000)
    assert steps == 390_625
    assert clock.to_steps("12.8e9 examples", batch_size=32_768, examples_per_epoch=1) == steps


@pytest.mark.parametrize(
    "duration",
    [
        "",
        "500",
        "steps",
        "500 parsecs",
        "-1 steps",
        "nan steps",
        "inf steps",
        "many steps",
        "5 steps or so",
        "5steps",
        "1 percents",
    ],
)
def test_not_a_duration(duration: str):
    with pytest.raises(UserError, match="is not a duration: write a number and one of"):
        clock.to_steps(duration, **RUN, total_steps=100)


def test_percent_of_nothing():
    with pytest.raises(UserError, match="percentage of itself"):
        clock.to_steps("5 percent", **RUN)


def test_is_due():
    assert [step for step in range(1, 26) if clock.is_due(step, 10, 25)] == [10, 20, 25]
    assert [step for step in range(1, 21) if clock.is_due(step, 10, 20)] == [10, 20]
    assert [step for step in range(1, 5) if clock.is_due(step, 0, 4)] == [4]
