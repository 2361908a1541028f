"""The state of a run for programs."""

import math
from datetime import datetime
from typing import Any

from clip_jax.common.starts import Start
from clip_jax.status import run as runs
from clip_jax.status import text
from clip_jax.status.run import Run


def to_plain(run: Run) -> dict[str, Any]:
    """Returns a run as JSON values; null: not known."""
    score = text.score_name(run)
    return {
        "workdir": run.name,
        "state": runs.state(run).value,
        "sentence": runs.sentence(run),
        "advice": runs.advice(run),
        "looked": _time(run.now),
        "step": run.step,
        "total_steps": run.total,
        "seconds_left": _number(run.left) if runs.state(run) is runs.State.RUNNING else None,
        "images_per_second": _number(run.recent("train/images_per_second")),
        "goodput": _number(run.account.goodput),
        "lost_steps": run.account.lost_steps,
        "seconds": dict(run.account.seconds),
        "score": {"name": score, "value": _number(text.last(run, score))} if score else None,
        "metrics": {name: _number(value) for name, (_, value) in text.latest(run).items()},
        "checkpoints": {
            "steps": list(run.checkpoints.steps),
            "best": run.checkpoints.best,
            "metric": run.checkpoints.metric,
            "value": _number(run.checkpoints.value),
        },
        "host": run.holder.host if run.holder else None,
        "process": run.holder.pid if run.holder else None,
        "starts": [_start(start, run) for start in run.starts],
        "remarks": list(run.remarks),
    }


def _start(start: Start, run: Run) -> dict[str, Any]:
    return {
        **start.facts,
        "start": start.number,
        "began": _time(start.began),
        "seen": _time(start.seen),
        "seconds": dict(start.seconds),
        "from_step": start.from_step,
        "step": start.step,
        "lost_steps": run.account.lost.get(start.number, 0),
        "exit_code": start.code,
        "ended": start.ending(run.lives(start)),
        "events": [
            {"time": _time(event.time), "step": event.step, "text": event.text}
            for event in start.events
        ],
    }


def _time(time: datetime) -> str:
    return time.isoformat(timespec="seconds")


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
