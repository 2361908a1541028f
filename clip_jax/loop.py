"""The training loop: steps, and what is due between them."""

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from clip_jax import checkpoint, clock, metrics, sharding, workdir
from clip_jax import state as train_state
from clip_jax import step as train_step
from clip_jax.data import pipeline
from clip_jax.errors import UserError


class Loop:
    """Steps, and what is due between them.

    Attributes:
      seconds: of this run and the runs it resumes, set-up left out.
      rate: images per second, latest.
    """

    def __init__(
        self,
        run: Any,
        config: ConfigDict,
        directory: epath.PathLike,
        store: checkpoint.Checkpoints,
        data: pipeline.TrainPipeline,
        meta: Mapping[str, Any],
    ):
        self.run_info, self._config, self._store, self._data = run, config, store, data
        self.start, self.examples_seen = meta["step"], meta["examples_seen"]
        self._seconds_before, self._started = meta["seconds"], time.monotonic()
        self.rate = 0.0
        self._writer = metrics.MetricWriter(
            directory, tensorboard=config.log.tensorboard, start_step=self.start
        )
        self._progress = metrics.Progress(self.start, run.total, config.batch_size)
        self._pending: tuple[int, train_step.Metrics] | None = None

    @property
    def seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    @property
    def data(self) -> pipeline.TrainPipeline:
        return self._data

    def run(self, state: train_state.TrainState, step_fn) -> dict[str, float]:
        """Trains to the last step; returns the last evaluation's metrics."""
        run = self.run_info
        place = sharding.batch_sharding(run.mesh)
        batches = pipeline.to_device(self._data, place, self._config.data.prefetch)
        evaluated: dict[str, float] = {}
        for step, batch in zip(range(self.start + 1, run.total + 1), batches):
            state, values = step_fn(state, batch)
            self.examples_seen += self._config.batch_size
            self._flush()  # an earlier step's, so that the device has this one to do meanwhile
            if clock.is_due(step, run.log_every, run.total):
                self._pending = step, values
            evaluated = {}
            if clock.is_due(step, run.eval_every, run.total):
                evaluated = self._evaluate(state, step)
            if clock.is_due(step, run.checkpoint_every, run.total):
                self._save(state, step, evaluated)
        batches.close()
        if not evaluated:  # resumed at the end: only the report is missing, the rows are there
            evaluated = run.evaluators.run(state.variables)
        return evaluated

    def _flush(self) -> None:
        """Writes the metrics that wait, once the device has them."""
        if self._pending is None:
            return
        step, device_values = self._pending
        self._pending = None
        values = metrics.fetch(device_values)
        self.rate = self._progress.rate(step)
        if not math.isfinite(values["loss"]):
            raise UserError(
                f"The loss is {values['loss']} at step {step}. Run again with a lower "
                "--config.optim.learning_rate, a longer --config.optim.warmup or a bound such as "
                "--config.optim.grad_clip_norm=1.0, in another --workdir."
            )
        row = {f"train/{name}": value for name, value in values.items()}
        row["train/images_per_second"] = self.rate
        row["data/skipped"] = self._data.skipped.total()
        row["data/truncated"] = self._data.truncated
        self._writer.write(step, row)
        self._progress.show(step, values["loss"], self.rate)

    def _evaluate(self, state: train_state.TrainState, step: int) -> dict[str, float]:
        self._flush()
        paused = self._progress.pause()
        found = self.run_info.evaluators.run(state.variables)
        if found:
            self._writer.write(step, found)
            shown = [f"{k} {v:.1%}" for k, v in found.items() if k.endswith(("top1", "recall@1"))]
            self._progress.note(f"step {step:,} evaluation  " + "  ".join(shown))
        self._progress.resume(paused)
        return found

    def _save(self, state: train_state.TrainState, step: int, found: Mapping[str, float]) -> None:
        self._flush()
        paused = self._progress.pause()
        meta = {
            "examples_seen": self.examples_seen,
            "seconds": self.seconds,
            "tokenizer": self.run_info.tokenizer.identity,
            "size": dataclasses.asdict(self.run_info.net.size),
            "config": workdir.to_plain(self._config),
        }
        self._store.save(state, step, meta, found)
        self._progress.resume(paused)
