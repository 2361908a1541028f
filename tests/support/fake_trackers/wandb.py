"""The part of W&B's interface that is used, writing to a file what it is told."""

import fake_log


class Settings:
    def __init__(self, console: str):
        assert console == "off"


class Run:
    url = "https://wandb.example/run"

    def __init__(self, run_id: str):
        self._id, self.step = run_id, 0

    def define_metric(self, name: str, step_metric: str | None = None):
        assert (name, step_metric) in (("step", None), ("*", "step"))

    def log(self, metrics: dict, step: int):
        assert step >= self.step
        self.step = step + 1
        metrics = dict(metrics)
        fake_log.send(self._id, metrics.pop("step"), metrics)

    def finish(self, exit_code: int):
        fake_log.end(self._id, "FINISHED" if exit_code == 0 else "KILLED")


def init(*, project, id, name, resume, config, allow_val_change, dir, settings) -> Run:
    assert resume == "allow"
    assert allow_val_change
    del dir, settings
    fake_log.begin(id, project, name, config)
    return Run(id)
