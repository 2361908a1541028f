"""Rows of metrics.jsonl after kills and after damage."""

import json
import random
import subprocess
import sys
import time

import pytest

from clip_jax.common import metrics

# Opens the file as a resumed run does, over and over, and appends nothing.
REOPEN = """
import sys
from clip_jax.common import metrics
print("ready", flush=True)
while True:
    metrics.MetricWriter(sys.argv[1], tensorboard=False, start_step=10**9)
"""


def rows(count: int) -> list[dict]:
    return [{"step": step, "train/loss": 1 / step} for step in range(1, count + 1)]


def test_no_kill_loses_a_row(tmp_path):
    want = rows(5000)
    path = tmp_path / metrics.FILE
    path.write_text("".join(json.dumps(row) + "\n" for row in want))
    chance = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", REOPEN, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(50):  # what a kill at this instant would leave
            time.sleep(chance.uniform(0, 0.004))
            assert path.read_bytes().count(b"\n") == len(want)
        process.kill()
        process.wait()
        assert metrics.read_history(tmp_path) == want


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 4, "train/lo',
        b'{"step": 4, "a": "\xff"}\n',
        b"[1, 2]\n",
        b'{"train/loss": 1.0}\n',
        b'{"step": "4", "train/loss": 1.0}\n',
        b'{"step": 4, "train/loss": "low"}\n',
        b'{"step": 4, "train/loss": null}\n',
        b'{"step": 4, "train/\\u001b[2J": 1.0}\n',
        b'{"step": 4, "train/\\ud800": 1.0}\n',
        b"[" * 100_000 + b"\n",
        b"\0" * 512 + b"\n",
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_lines_that_are_no_rows_are_dropped_and_counted(tmp_path, caplog, line, first):
    good = "".join(json.dumps(row) + "\n" for row in rows(3)).encode()
    line = line.rstrip(b"\n") + b"\n" if first else line
    (tmp_path / metrics.FILE).write_bytes(line + good if first else good + line)
    writer = metrics.MetricWriter(tmp_path, tensorboard=False, start_step=3)
    assert "Dropped 1 of 4 lines" in caplog.text
    writer.write(4, {"train/loss": 0.25})
    writer.close()
    caplog.clear()
    assert metrics.read_history(tmp_path) == rows(4)
    assert not caplog.text


def test_an_evaluation_that_is_due_again_leaves_one_row(tmp_path):
    """A start that was killed after the evaluation that it owed, and before its next checkpoint."""
    evaluation = {"step": 4, metrics.EVALUATED: 64.0, "zeroshot/top1": 0.5}
    earlier = {"step": 2, metrics.EVALUATED: 32.0, "zeroshot/top1": 0.25}
    before = [*rows(2), earlier, *rows(4)[2:]]
    (tmp_path / metrics.FILE).write_text("".join(json.dumps(row) + "\n" for row in before))
    for _ in range(2):
        writer = metrics.MetricWriter(
            tmp_path, tensorboard=False, start_step=4, evaluation_due=True
        )
        writer.write(4, {k: v for k, v in evaluation.items() if k != "step"})
        writer.write(5, {"train/loss": 0.2})
    assert metrics.read_history(tmp_path) == [*before, evaluation, rows(5)[4]]
    metrics.MetricWriter(tmp_path, tensorboard=False, start_step=4)
    assert metrics.read_history(tmp_path) == [*before, evaluation]
