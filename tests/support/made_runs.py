"""Workdirs written by hand, with the files of a run and figures that are known."""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

BEGAN = datetime(2026, 11, 27, 18, 0, tzinfo=UTC)  # a Friday


def at(seconds: float) -> datetime:
    """The time so many seconds after `BEGAN`."""
    return BEGAN + timedelta(seconds=seconds)


def write_start(
    workdir: pathlib.Path,
    number: int,
    span: tuple[float, float],
    steps: tuple[int, int] | None,
    seconds: Mapping[str, float],
    end: tuple[int, str] | None = None,
    **others: Any,
) -> dict[str, Any]:
    """Writes the record of a start, as clip_jax/training/record.py does.

    Args:
      workdir: directory of the run.
      number: number of the start.
      span: beginning and last sign of life, in seconds after `BEGAN`.
      steps: first and last step; None: it did not come to training.
      seconds: time by phase.
      end: exit code and reason; None: killed, or alive.
      **others: fields to add or to replace.
    """
    first, last = map(at, span)
    fields = {
        "start": number,
        "began": first.isoformat(),
        "seen": last.isoformat(),
        "ended": last.isoformat() if end else None,
        "end": {"code": end[0], "reason": end[1]} if end else None,
        "phase": "train",
        "stepped": last.isoformat(),
        "from_step": steps and steps[0],
        "step": steps and steps[1],
        "total_steps": 20_000,
        "batch_size": 64,
        "seconds": {"start": 0.0, "compile": 0.0, "train": 0.0, **seconds},
        "events": [],
        "command": "python main.py --config=configs/vit_b32.py --workdir=runs/b32",
        "hardware": "4 x TPU v5e",
        "hosts": 2,
        **others,
    }
    (workdir / "starts").mkdir(parents=True, exist_ok=True)
    (workdir / "starts" / f"{number:04}.json").write_text(json.dumps(fields))
    return fields


def loss(step: int) -> float:
    """The loss of a step."""
    return 1.2 + 6 * math.exp(-step / 3000) + 0.1 * math.sin(step)


def write_rows(workdir: pathlib.Path, steps: Sequence[int], offset: float = 0.0) -> None:
    """Writes rows of a loss that falls, and of a score that rises every 1,000 steps."""
    rows: list[dict[str, float]] = []
    for step in steps:
        rows.append(
            {"step": step, "train/loss": loss(step) + offset, "train/images_per_second": 3210.0}
        )
        rows[-1] |= {"train/mfu": 0.412}
        rows[-1] |= {"train/learning_rate": 1e-4, "data/skipped": 0.0}
        if step % 1000 == 0:
            rows.append({"step": step, "zeroshot/top1": 0.4 * (1 - math.exp(-step / 5000))})
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_lease(workdir: pathlib.Path, **others: Any) -> None:
    """Writes the lease of a run on another host."""
    holder = {"id": "1", "host": "tpu-host-0", "pid": 4242, "machine": "elsewhere", "started": "1"}
    holder |= {"since": "2026-11-27 18:00:00", "beat": 3, **others}
    (workdir / "lease.json").write_text(json.dumps(holder))


def touch_lease(workdir: pathlib.Path, seconds: float) -> None:
    """Gives the lease the age of a last beat, in seconds after `BEGAN`."""
    os.utime(workdir / "lease.json", (at(seconds).timestamp(),) * 2)


def weekend(workdir: pathlib.Path) -> None:
    """A run of 20,000 steps that was stopped, killed and interrupted, and lives 9,000 s later."""
    phases = {"start": 20.0, "compile": 30.0}
    write_start(
        workdir, 1, (0, 2000), (0, 4000),
        {**phases, "train": 1800.0, "data": 50.0, "checkpoint": 40.0, "evaluation": 60.0},
        (42, "SIGTERM: saved at step 4,000."),
    )  # fmt: skip
    write_start(
        workdir, 2, (2300, 4300), (4000, 8000),
        {**phases, "train": 1850.0, "data": 20.0, "checkpoint": 30.0, "evaluation": 50.0},
    )  # fmt: skip
    write_start(
        workdir, 3, (5000, 5060), None, {"start": 60.0},
        (2, "The archive shards/*.tar cannot be read: no such file."), phase="start",
    )  # fmt: skip
    event = {"time": at(6200).isoformat(), "step": 7000, "text": "The newest checkpoint, of step "}
    event["text"] += "8,000, is damaged: the run resumes at step 6,000. The damaged one is kept as "
    event["text"] += "checkpoints/8000.damaged."
    write_start(
        workdir, 4, (6000, 9000), (6000, 12_000),
        {**phases, "train": 2700.0, "data": 100.0, "checkpoint": 50.0, "evaluation": 100.0},
        events=[event],
    )  # fmt: skip
    write_rows(workdir, range(20, 12_001, 20))
    write_lease(workdir)
    for step in (8000, 10_000, 12_000):
        (workdir / "checkpoints" / str(step)).mkdir(parents=True)
    config = {"model": {"name": "ViT-B/32"}, "checkpoint": {"best_metric": "zeroshot/top1"}}
    config |= {"data": {"source": {"type": "tar"}}, "batch_size": 64}
    (workdir / "config.json").write_text(json.dumps(config))
