"""The sums over the starts of a run, against a simulation that knows every step."""

import json
import random
from collections import Counter
from typing import Any

import made_runs
import pytest

from clip_jax.common import goodput, starts


def read(workdir) -> tuple[goodput.Account, list[str]]:
    found, damaged = starts.read(workdir)
    return goodput.account(found), damaged


def test_a_weekend_by_hand(tmp_path):
    made_runs.weekend(tmp_path)
    account, damaged = read(tmp_path)
    assert not damaged
    assert not account.remarks
    # Start 2 trained steps 6,001 to 8,000 in 925 of its 1,850 s; start 4 began at 6,000.
    assert account.lost == {1: 0, 2: 2000, 4: 0}
    assert account.seconds == pytest.approx(
        {
            "train": 1800 + 925 + 2700,
            "lost": 925,
            "data": 170,
            "checkpoint": 120,
            "evaluation": 210,
            "compile": 90,
            "start": 120,
            "other": 0,
            "down": 300 + 700 + 940,
            "unknown": 0,
        }
    )
    assert account.wall == pytest.approx(9000)
    assert account.goodput == pytest.approx(5425 / 9000)


@pytest.mark.parametrize("seed", range(20))
def test_against_a_simulation(tmp_path, seed: int):
    """Each step is known by start, with its time; it remains where no later start does it again."""
    chance = random.Random(seed)
    time, saved = 0.0, 0
    done: dict[int, tuple[int, float]] = {}  # by step: the start that did it last, and its seconds
    number_lost: Counter[int] = Counter()
    for number in range(1, chance.randint(2, 12)):
        began = time
        setup, pace = chance.uniform(1, 90), chance.uniform(0.1, 3)
        if chance.random() < 0.2:  # dies before its first step
            time += setup
            made_runs.write_start(tmp_path, number, (began, time), None, {"start": setup})
        else:
            saved //= chance.choice((1, 1, 2))  # now and then the newest checkpoint is damaged
            count = chance.randint(1, 200)
            for step in range(saved + 1, saved + count + 1):
                number_lost.update([done[step][0]] if step in done else [])
                done[step] = number, pace
            for step in [step for step in done if step > saved + count]:
                number_lost[done.pop(step)[0]] += 1
            time += setup + count * pace
            made_runs.write_start(
                tmp_path,
                number,
                (began, time),
                (saved, saved + count),
                {"start": setup, "train": count * pace},
            )
            saved += chance.randint(0, count)
        time += chance.uniform(0, 500)
    account, _ = read(tmp_path)
    # A start that ended further on than the next began is cut there, though nobody did it again.
    kept = sum(seconds for _, seconds in done.values())
    assert account.seconds["train"] == pytest.approx(kept)
    assert {n: steps for n, steps in account.lost.items() if steps} == dict(number_lost)
    assert account.wall == pytest.approx(
        (starts.read(tmp_path)[0][-1].seen - made_runs.BEGAN).total_seconds(), abs=1e-3
    )
    assert account.goodput == pytest.approx(kept / account.wall)
    assert not account.remarks


def test_steps_saved_after_the_last_record(tmp_path):
    """A record of a killed start is some seconds old: what the next resumes from was reached."""
    made_runs.write_start(tmp_path, 1, (0, 100), (0, 90), {"train": 100.0})
    made_runs.write_start(tmp_path, 2, (110, 210), (96, 196), {"train": 100.0})
    made_runs.write_start(tmp_path, 3, (220, 320), (50, 150), {"train": 100.0})
    account, _ = read(tmp_path)
    assert account.lost == {1: 46, 2: 100, 3: 0}
    assert account.seconds["train"] == pytest.approx(100 * 50 / 90 + 100)


def test_a_start_that_finished_no_step(tmp_path):
    made_runs.write_start(tmp_path, 1, (0, 100), (0, 0), {"train": 100.0})
    account, _ = read(tmp_path)
    assert (account.seconds["train"], account.seconds["lost"]) == (0.0, 100.0)
    assert account.goodput == 0.0


def test_roll_backs(tmp_path):
    """Steps 51 to 80 twice, then 21 to 100 again; the next start repeats 91 to 100."""
    rollbacks = [{"from_step": 80, "to_step": 50}, {"from_step": 70, "to_step": 20}]
    made_runs.write_start(
        tmp_path, 1, (0, 400), (10, 100), {"train": 340.0, "data": 60.0}, rollbacks=rollbacks
    )
    made_runs.write_start(tmp_path, 2, (400, 500), (90, 190), {"train": 100.0})
    account, _ = read(tmp_path)
    trained = [*range(11, 81), *range(51, 71), *range(21, 101)]  # by start 1, 2 s each
    assert account.lost == {1: len(trained) - 80, 2: 0}
    assert account.seconds["train"] == pytest.approx(80 * 2 + 100)
    assert account.seconds["lost"] == pytest.approx((len(trained) - 80) * 2)


# ---- Damage ------------------------------------------------------------------------------------


def test_a_start_that_is_missing(tmp_path):
    """Nobody knows whether time and steps between its neighbours were lost."""
    made_runs.write_start(tmp_path, 2, (0, 100), (0, 100), {"train": 100.0})
    made_runs.write_start(tmp_path, 5, (400, 500), (300, 400), {"train": 100.0})
    account, damaged = read(tmp_path)
    assert not damaged
    assert (account.seconds["unknown"], account.seconds["down"]) == (300.0, 0.0)
    assert account.lost == {2: 0, 5: 0}
    before, between = account.remarks
    assert before.startswith("Start 1 has no record that can be read. The time before start 2")
    assert between.startswith("Starts 3 to 4 have no record that can be read.")


def test_a_clock_that_went_back(tmp_path):
    made_runs.write_start(tmp_path, 1, (1000, 1100), (0, 100), {"train": 100.0})
    made_runs.write_start(tmp_path, 2, (400, 500), (100, 200), {"train": 100.0})
    account, _ = read(tmp_path)
    assert account.wall == pytest.approx(200)
    assert account.goodput == pytest.approx(1)
    (remark,) = account.remarks
    assert "Start 2 began 11m 40s before the last sign of life of start 1" in remark


def test_a_clock_that_jumped_within_a_start(tmp_path):
    made_runs.write_start(tmp_path, 1, (1000, 400), (0, 100), {"train": 100.0})
    made_runs.write_start(tmp_path, 2, (1010, 1020), (100, 200), {"train": 100.0})
    account, _ = read(tmp_path)
    assert account.goodput == pytest.approx(200 / 210)
    assert len(account.remarks) == 2
    assert "last sign of life before its beginning" in account.remarks[0]
    assert "1m 30s longer than the whole" in account.remarks[1]


DAMAGES: list[tuple[dict[str, Any] | bytes, str]] = [
    (b"", "cut short"),
    (b'{"start": 1, "began": "20', "cut short"),
    (b"\xff\xfe\x00", "cut short"),
    (b"[" * 100_000, ""),
    (b"[1]", "not an object"),
    ({"began": None}, '"began" is None'),
    ({"began": "yesterday"}, "'yesterday'"),
    ({"began": 5}, '"began" is 5'),
    ({"began": "2026-11-27T18:00:00"}, "no time zone"),
    ({"seen": "0001-01-01T00:00:00+00:00"}, "year 1"),
    ({"step": -1}, '"step" is -1'),
    ({"step": 3.5}, '"step" is 3.5'),
    ({"step": True}, '"step" is True'),
    ({"step": 10**400}, '"step" is 1'),
    ({"from_step": 300}, "it goes from step 300 to step 100"),
    ({"rollbacks": [{"from_step": 90, "to_step": 300}]}, "it goes from step 300 to step 100"),
    ({"rollbacks": [{"from_step": 90, "to_step": -3}]}, '"to_step" is -3'),
    ({"rollbacks": 3}, '"rollbacks"'),
    ({"seconds": {"train": -1.0}}, "'train' is -1.0"),
    ({"seconds": {"train": float("nan")}}, "not JSON"),
    ({"seconds": {"train": 10**400}}, "'train' is 1"),
    ({"seconds": [1]}, '"seconds" is [1]'),
    ({"end": "gone"}, "\"end\" is 'gone'"),
    ({"end": {"code": "1"}}, '"end" is'),
    ({"events": "none"}, '"events"'),
    ({"events": [{"time": None}]}, '"time" is None'),
]


@pytest.mark.parametrize(("damage", "told"), DAMAGES)
def test_damaged_records_are_named_and_left_out(tmp_path, damage, told: str):
    made_runs.write_start(tmp_path, 1, (0, 100), (0, 100), {"train": 100.0})
    fields = made_runs.write_start(tmp_path, 2, (100, 200), (0, 100), {"train": 100.0})
    path = tmp_path / "starts" / "0002.json"
    if isinstance(damage, dict):
        damage = json.dumps(fields | damage).encode()
    path.write_bytes(damage)
    (tmp_path / "starts" / "0003.json.tmp").write_bytes(b"{")  # a write that was cut short
    account, (sentence,) = read(tmp_path)
    assert sentence.startswith("starts/0002.json is left out, since it is damaged: ")
    assert told in sentence
    assert len(sentence) < 200
    assert account.seconds["train"] == 100.0


def test_fields_of_a_later_version_are_kept(tmp_path):
    fields = made_runs.write_start(tmp_path, 1, (0, 100), (0, 100), {"train": 90.0, "naps": 10.0})
    (tmp_path / "starts" / "0001.json").write_text(json.dumps(fields | {"mood": "good"}))
    (start,), _ = starts.read(tmp_path)
    assert start.facts["mood"] == "good"
    assert goodput.account([start]).seconds["other"] == 10.0


def test_no_starts(tmp_path):
    assert starts.read(tmp_path) == ([], [])
    assert goodput.account([]).wall == 0
    (tmp_path / "starts").write_text("a file")
    assert starts.read(tmp_path) == ([], [])
