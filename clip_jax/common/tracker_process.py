"""The process of one tracker: reads rows from standard input, and sends each of them once.

A row is sent again until the tracker takes it. WORKDIR/trackers/NAME.json keeps the id of the run
there and, by metric, the last step sent: so a resumed run continues it, and neither doubles a row
nor leaves one out that the tracker missed while it was down.
"""

import contextlib
import hashlib
import json
import os
import re
import select
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from clip_jax.common import metric_rows
from clip_jax.storage import locations, ranges, remote, writing

_ORPHANED = 10.0  # seconds for the last rows after the trainer is gone
_LONGEST_PAUSE = 10.0  # seconds between two tries
_SAVE_EVERY = 1.0  # seconds


class _Refused(Exception):
    """A row that the tracker would refuse again."""


class _Backend(Protocol):
    """One tracker's run."""

    url: str  # for the user to open; "": none

    def send(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, finished: bool) -> None: ...


class _Wandb:
    def __init__(self, about: Mapping[str, Any], kept: Mapping[str, Any], name: str):
        import wandb

        workdir = locations.parse(about["workdir"])
        inside = not remote.is_remote(workdir) and "WANDB_DIR" not in os.environ
        self._run = wandb.init(
            project=about["project"],
            id=kept["id"],
            name=name,
            resume="allow",
            config={**about["config"], "hardware": about["hardware"]},
            allow_val_change=True,
            dir=os.fspath(workdir) if inside else None,
            settings=wandb.Settings(console="off"),
        )
        # W&B's own step, the number of the row, must never go back. Offline it begins at 0 again.
        self._row = kept["rows"]
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.url = self._run.url or ""

    def send(self, step: int, metrics: Mapping[str, float]) -> None:
        try:
            self._row = max(self._row, self._run.step)
            self._run.log({"step": step, **metrics}, step=self._row)
            self._row += 1
        except Exception as error:  # it queues by itself: nothing else fails here
            raise _Refused(_explain(error)) from error

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class _Mlflow:
    def __init__(self, about: Mapping[str, Any], kept: Mapping[str, Any], name: str):
        # Its own repetitions would take many minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        import mlflow
        from mlflow import entities

        self._mlflow, self._entities = mlflow, entities
        self._client = client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name(about["project"])
        place = (
            experiment.experiment_id if experiment else client.create_experiment(about["project"])
        )
        # MLflow makes the ids of runs: ours is a tag.
        tag = "clip_jax.run"
        found = client.search_runs([place], f"tags.`{tag}` = '{kept['id']}'")
        if found:
            run = found[0]
            client.update_run(run.info.run_id, status="RUNNING")
        else:
            run = client.create_run(place, run_name=name, tags={tag: kept["id"]})
        self._id = run.info.run_id
        client.set_tag(self._id, "hardware", about["hardware"])
        # A parameter cannot be changed later: those that a resumed run has changed stay.
        params = [
            entities.Param(_mlflow_name(key), str(value)[:500])
            for key, value in about["config"].items()
            if _mlflow_name(key) not in run.data.params
        ]
        for first in range(0, len(params), 100):
            client.log_batch(self._id, params=params[first : first + 100])
        uri = mlflow.get_tracking_uri()
        web = uri.startswith("http")
        self.url = f"{uri}/#/experiments/{place}/runs/{self._id}" if web else uri

    def send(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        made = [
            self._entities.Metric(_mlflow_name(name), value, now, step)
            for name, value in metrics.items()
        ]
        try:
            self._client.log_batch(self._id, metrics=made)
        except self._mlflow.MlflowException as error:
            if 400 <= error.get_http_status_code() < 500:
                raise _Refused(_explain(error)) from error
            raise

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


def _mlflow_name(name: str) -> str:
    """Returns a name of the characters that MLflow allows: recall@1 as recall_at_1."""
    return re.sub(r"[^\w\-. /]", "_", name.replace("@", "_at_"))


class _Trackio:
    def __init__(self, about: Mapping[str, Any], kept: Mapping[str, Any], name: str):
        import trackio

        self._run = trackio.init(
            project=about["project"],
            name=f"{name}-{kept['id']}",  # runs are told apart by their names
            resume="allow",
            config={**about["config"], "hardware": about["hardware"]},
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._trackio = trackio
        self.url = ""

    def send(self, step: int, metrics: Mapping[str, float]) -> None:
        try:
            self._run.log(dict(metrics), step=step)
        except Exception as error:  # it queues by itself: nothing else fails here
            raise _Refused(_explain(error)) from error

    def close(self, finished: bool) -> None:
        del finished
        self._trackio.finish()


# By name, one of `choices.TRACKERS`.
_BACKENDS = {"wandb": _Wandb, "mlflow": _Mlflow, "trackio": _Trackio}


class _Sender:
    """Sends the rows of a run, each metric of a step once."""

    def __init__(self, about: Mapping[str, Any]):
        self._about, self._name = about, about["tracker"]
        self._workdir = locations.parse(about["workdir"])
        self._path = self._workdir / "trackers" / f"{self._name}.json"
        self._kept = self._read()
        self._sent: dict[str, int] = self._kept["sent"]
        if about["went_back"]:
            self._sent.update({n: min(s, about["start_step"]) for n, s in self._sent.items()})
        self._said: set[str] = set()
        self._backend: _Backend | None = None
        self._saved, self._changed = 0.0, False

    def _read(self) -> dict[str, Any]:
        """Reads what is known of the run there; makes an id where there is none.

        A run that starts once more from step 0 with other settings is another run.
        """
        settings = json.dumps(self._about["config"], sort_keys=True)
        digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
        new = {"id": uuid.uuid4().hex[:8], "config": digest, "rows": 0, "refused": 0, "sent": {}}
        try:
            kept = json.loads(ranges.read(self._path))
        except (FileNotFoundError, ValueError):
            return new
        again = self._about["start_step"] > 0 or kept["config"] == digest
        return kept if again else new

    def save(self) -> None:
        """Writes it down, if it has changed, at most once a second."""
        if not self._changed or time.monotonic() - self._saved < _SAVE_EVERY:
            return
        self._saved, self._changed = time.monotonic(), False
        try:
            writing.write(self._path, json.dumps(self._kept) + "\n")
        except Exception as error:
            self._say_once("save", f"{self._path} cannot be written: {_explain(error)}.")

    def start(self) -> None:
        """Opens the run there, and sends the rows of before that it has not got."""
        self._changed = True
        self.save()
        name = self._workdir.name
        make = _BACKENDS[self._name]
        self._backend = self._until_done(lambda: make(self._about, self._kept, name))
        where = f" at {self._backend.url}" if self._backend.url else ""
        _say(f"The metrics go to {self._name} too: run {name}, id {self._kept['id']}{where}.")
        if start_step := self._about["start_step"]:
            for row in metric_rows.read_history(self._workdir):
                if row["step"] <= start_step:
                    self.send(row)

    def send(self, row: Mapping[str, float]) -> None:
        """Sends those metrics of a row that have not been sent for its step or a later one."""
        backend, step = self._backend, int(row["step"])
        assert backend is not None
        new = {n: v for n, v in row.items() if n != "step" and step > self._sent.get(n, -1)}
        if not new:
            return
        try:
            self._until_done(lambda: backend.send(step, new))
        except _Refused as error:
            self._kept["refused"] += 1
            self._say_once("refused", f"{self._name} refuses a row, at step {step}: {error}.")
        self._kept["rows"] += 1
        self._sent.update(dict.fromkeys(new, step))
        self._changed = True
        self.save()

    def close(self, finished: bool) -> None:
        """Ends the run there."""
        self._saved = 0.0
        self.save()
        if self._backend is None:
            return
        try:
            self._backend.close(finished)
        except Exception as error:
            _say(f"{self._name} could not end the run: {_explain(error)}.")
        if refused := self._kept["refused"]:
            _say(f"{self._name} has refused {refused:,} rows. metrics.jsonl has them all.")

    def _until_done(self, call):
        """Calls until there is no error, with pauses that grow."""
        pause, tries = 1.0, 0
        while True:
            try:
                result = call()
            except _Refused:
                raise
            except Exception as error:
                tries += 1
                self._say_once(
                    "down",
                    f"{self._name} does not take the metrics ({_explain(error)}). Training goes "
                    "on, and they are sent as soon as it does.",
                )
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            if tries:
                self._said.discard("down")
                _say(f"{self._name} takes the metrics again, after {tries:,} failed tries.")
            return result

    def _say_once(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            _say(text)


def _explain(error: Exception) -> str:
    """Returns an error as a short text on one line."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


_out = sys.stdout


def _say(text: str) -> None:
    """Tells the trainer a sentence for the user."""
    with contextlib.suppress(OSError, ValueError):  # the trainer may be gone
        print(" ".join(text.split()), file=_out, flush=True)


def _lines() -> Iterator[bytes | None]:
    """Yields the lines of standard input, None after a second without one."""
    rest = b""
    while True:
        if not select.select([0], [], [], _SAVE_EVERY)[0]:
            yield None
            continue
        data = os.read(0, 1 << 16)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from lines


def _die_with(parent: int) -> None:
    """Ends this process a while after the trainer, whatever it waits for."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(_ORPHANED)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Reads facts about the run and rows from standard input, until that is closed."""
    global _out
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # sent to all processes of a job: the trainer tells
    threading.Thread(target=_die_with, args=[os.getppid()], daemon=True).start()
    _out = os.fdopen(os.dup(1), "w")  # trackers print what they like elsewhere
    os.dup2(2, 1)
    try:
        _run(_lines())
    except Exception as error:
        _say(f"A tracker's process fails: {_explain(error)}.")
        raise


def _run(lines: Iterator[bytes | None]) -> None:
    """Sends the rows of all lines; the first one tells about the run."""
    sender = _Sender(json.loads(next(filter(None, lines))))
    sender.start()
    finished = False
    for line in lines:
        if line is None:
            sender.save()
        elif (row := json.loads(line)) == "end":
            finished = True
        else:
            sender.send(row)
    sender.close(finished)
