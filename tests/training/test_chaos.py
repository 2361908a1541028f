"""Runs that are killed: the short form of benchmarks/chaos.py, and that it sees what is wrong."""

import argparse
import importlib.util
import json
import pathlib
import random
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import tiny_run
import xla_flags

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "chaos.py"
spec = importlib.util.spec_from_file_location("chaos", SCRIPT)
assert spec is not None
assert spec.loader is not None
chaos = sys.modules["chaos"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(chaos)

OPTIONS = argparse.Namespace(steps=12, eval_every=6, devices=4)


def play(tmp_path: pathlib.Path, *flags: str) -> str:
    """Plays faults with the tiny model; returns what the script prints."""
    command = [sys.executable, str(SCRIPT), "--model=tiny", f"--folder={tmp_path}", *flags]
    ended = subprocess.run(
        command, env=xla_flags.environment(1), capture_output=True, text=True, timeout=900
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_two_kills_change_nothing(tmp_path: pathlib.Path):
    flags = ("--kills=2", "--steps=9", "--save_every=2", "--eval_every=3", "--devices=2")
    printed = play(tmp_path, *flags, "--hosts", "1", "2")
    assert "2 kills of 9 steps" in printed
    assert "are bit-identical." in printed


@pytest.mark.slow
def test_eight_kills_on_two_hosts_one_and_four_change_nothing(tmp_path: pathlib.Path):
    flags = ("--kills=8", "--steps=48", "--save_every=3", "--eval_every=6")
    printed = play(tmp_path, *flags)
    assert "8 kills of 48 steps" in printed
    assert "are bit-identical." in printed


def test_every_fault_is_played_as_often_as_the_others():
    count = 5 * len(chaos.DECK)
    dealt = list(chaos.faults(count, [2, 1, 4], random.Random(0)))
    assert [hosts for _, hosts in dealt[:6]] == [2, 1, 4, 2, 1, 4]
    assert all(hosts > 1 for fault, hosts in dealt if fault.one)
    times = Counter(fault for fault, _ in dealt)
    assert times.keys() == set(chaos.DECK)
    assert max(times.values()) - min(times.values()) <= 4


def finished(folder: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(tiny_run.finished(), folder / "killed"))


def compare(folder: pathlib.Path) -> tuple[list[str], str]:
    runs = [chaos.Workdir(path, 6, 12) for path in (folder, tiny_run.finished())]
    return chaos.compare(*runs, OPTIONS)


def test_equal_runs_are_bit_identical(tmp_path: pathlib.Path):
    problems, sentence = compare(finished(tmp_path))
    assert not problems
    assert "bit-identical" in sentence


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[:4] + rows[5:], "rows of 11 steps, not of 12"),
        (lambda rows: [*rows, rows[4]], "of step 5 stands there twice"),
        (
            lambda rows: [row for row in rows if row["step"] != 6 or "train/loss" in row],
            "evaluations at [12], not at [6, 12]",
        ),
        (
            lambda rows: [
                {**row, "train/loss": row["train/loss"] * (1 + 1e-15)}
                if "train/loss" in row
                else row
                for row in rows
            ],
            "differ",
        ),
    ],
)
def test_what_is_wrong_with_the_curve_is_said(tmp_path: pathlib.Path, change, said: str):
    folder = finished(tmp_path)
    rows = change(tiny_run.read_rows(folder))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems, _ = compare(folder)
    assert any(said in problem for problem in problems), problems


def test_another_array_is_seen(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    folder, load = finished(tmp_path), chaos.load

    def loaded(path: pathlib.Path) -> dict:
        arrays = load(path)
        if folder in path.parents:
            name = min(arrays)
            arrays[name] = arrays[name] + 1
        return arrays

    monkeypatch.setattr(chaos, "load", loaded)
    problems, sentence = compare(folder)
    assert problems == ["the runs differ"]
    assert "1 of " in sentence
