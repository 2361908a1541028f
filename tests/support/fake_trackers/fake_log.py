"""The file that all fake trackers write to, and the ways in which they fail.

FAKE_TRACKER_FAILS: "down" raises errors as long as a file FAKE_TRACKER_LOG.down is there; "hang"
never returns; "exit" ends the process. All from step 3 on.
"""

import json
import os
import pathlib
import time

PATH = pathlib.Path(os.environ["FAKE_TRACKER_LOG"])


def lines() -> list[dict]:
    return [json.loads(line) for line in PATH.read_text().splitlines()] if PATH.exists() else []


def _add(kind: str, run_id: str, **fields):
    with PATH.open("a") as file:
        file.write(json.dumps({"kind": kind, "id": run_id, **fields}) + "\n")


def begin(run_id: str, project: str, name: str, settings: dict):
    print("chatter of the tracker", flush=True)
    _add("begin", run_id, project=project, name=name, pid=os.getpid())
    config(run_id, settings)


def config(run_id: str, settings: dict):
    if settings:
        _add("config", run_id, config=settings)


def send(run_id: str, step: int, metrics: dict):
    fails = os.environ.get("FAKE_TRACKER_FAILS") if step >= 3 else ""
    if fails == "exit":
        os._exit(7)
    if fails == "hang":
        time.sleep(1000)
    if fails == "down" and PATH.with_suffix(".down").exists():
        raise ConnectionError("connection refused")
    _add("row", run_id, step=step, metrics=metrics)


def end(run_id: str, status: str):
    _add("end", run_id, status=status)
