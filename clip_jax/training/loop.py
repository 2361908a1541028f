"""The training loop: steps, and between them logs, evaluations and checkpoints."""

import contextlib
import dataclasses
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from clip_jax import checkpoint, models, sharding
from clip_jax import state as train_state
from clip_jax.common import clock, metrics
from clip_jax.data import identity, pipeline
from clip_jax.data.feed import Feed
from clip_jax.data.order import Order, Weighted
from clip_jax.data.sources.base import Source
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.errors import StorageError, UserError
from clip_jax.evaluate.evaluator import Evaluator
from clip_jax.storage import faults
from clip_jax.training import step as train_step
from clip_jax.training import workdir
from clip_jax.training.program import Program


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run that do not change."""

    program: Program
    tokenizer: Tokenizer
    source: Source
    order: Order
    data: identity.Identity
    evaluator: Evaluator
    total_steps: int
    log_every: int  # steps
    eval_every: int  # steps
    checkpoint_every: int  # steps

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.program.mesh

    @property
    def net(self) -> models.ImageModel:
        """The model."""
        return self.program.net


@dataclasses.dataclass(frozen=True)
class ResumeState:
    """The progress of a run and of those that it resumes, as a checkpoint stores it."""

    step: int = 0
    examples_seen: int = 0
    seconds: float = 0.0  # wall time
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)  # examples by reason
    truncated: int = 0  # captions

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> "ResumeState":
        """Reads the metadata of a checkpoint."""
        return cls(**{field.name: meta[field.name] for field in dataclasses.fields(cls)})


class Loop:
    """Runs the steps, and between them logs, evaluations and checkpoints."""

    def __init__(
        self,
        run: Run,
        config: ConfigDict,
        directory: epath.PathLike,
        store: checkpoint.Checkpoints,
        data: pipeline.TrainPipeline,
        resume_state: ResumeState,
        started_monotonic: float,
    ):
        """Opens the logs in `directory`.

        Args:
          run: the parts that do not change.
          config: the whole config.
          directory: the workdir.
          store: its checkpoints.
          data: training data, from where `resume_state` ended.
          resume_state: progress of the runs that this one resumes.
          started_monotonic: start of this run by `time.monotonic`.
        """
        self._run, self._config, self._store = run, config, store
        self._data, self._resume_state = data, resume_state
        self._started_monotonic = started_monotonic
        self._writer = metrics.MetricWriter(
            directory, tensorboard=config.log.tensorboard, start_step=resume_state.step
        )
        self._progress = metrics.Progress(resume_state.step, run.total_steps, config.batch_size)
        self._pending: tuple[int, train_step.Metrics] | None = None
        self._reported: Mapping[str, int] = resume_state.skipped
        self._feed = Feed(
            data,
            sharding.batch_sharding(run.mesh),
            config.data.prefetch,
            stall_timeout=config.data.stall_timeout,
            describe=self._describe,
        )

    def progress(self, step: int) -> ResumeState:
        """Returns the progress of all hosts up to `step`, the resumed runs included.

        Every host must call it at the same step.
        """
        before = self._resume_state
        seen = metrics.sum_over_hosts({**self._data.skipped, "truncated": self._data.truncated})
        truncated = seen.pop("truncated")
        return ResumeState(
            step=step,
            examples_seen=self._examples_seen(step),
            seconds=before.seconds + time.monotonic() - self._started_monotonic,
            skipped=dict(Counter(before.skipped) + Counter(seen)),
            truncated=before.truncated + truncated,
        )

    def _describe(self) -> str:
        """Describes the state of the data pipeline, for the error when it hangs."""
        failures = faults.counts()
        before = f"; storage failed before: {list_counts(failures)}" if failures else ""
        return self._data.describe() + before

    def _examples_seen(self, step: int) -> int:
        return (
            self._resume_state.examples_seen
            + (step - self._resume_state.step) * self._config.batch_size
        )

    def run(self, state: train_state.TrainState, step_fn) -> dict[str, float]:
        """Trains to the last step; returns the last evaluation's metrics."""
        run = self._run
        evaluated: dict[str, float] = {}
        with self._logging(), contextlib.closing(self._feed):
            for step, batch in zip(
                range(self._resume_state.step + 1, run.total_steps + 1), self._feed
            ):
                state, values = step_fn(state, batch)
                self._flush()  # an earlier step's, so that the device has this one to do meanwhile
                if clock.is_due(step, run.log_every, run.total_steps):
                    self._pending = step, values
                evaluated = self._evaluate(state, step)
                if clock.is_due(step, run.checkpoint_every, run.total_steps) or self._lost(step):
                    self._save(state, step, values, evaluated)
                    while step == run.total_steps and not self._store.finish():
                        self._save(state, step, values, evaluated)
        if not evaluated:  # resumed at the end: only the report is missing, the rows are there
            evaluated = run.evaluator.run(state.variables)
        return evaluated

    @contextlib.contextmanager
    def _logging(self) -> Iterator[None]:
        """Writes all rows to the workdir at the end, even after an error."""
        try:
            yield
        except StorageError:
            raise  # to ask the same storage again would take as long again
        except BaseException:
            self._writer.flush()
            raise
        self._writer.close()

    def _lost(self, step: int) -> bool:
        """Returns whether the last checkpoint failed and is to be saved again now."""
        return clock.is_due(step, self._run.log_every, 0) and self._store.lost()

    def _flush(self) -> None:
        """Writes the pending metrics, once the device has computed them."""
        if self._pending is None:
            return
        step, device_values = self._pending
        self._pending = None
        values = metrics.fetch(device_values)
        self._check_finite(step, values)
        rate, waited = self._progress.measure(step, self._feed.waited)
        row = {f"train/{name}": value for name, value in values.items()}
        row["train/images_per_second"] = rate
        # This host's alone: a sum over hosts would hold up the device.
        row["data/waiting"] = waited
        row["data/skipped"] = sum(self._data.skipped.values())
        if isinstance(self._run.order, Weighted):
            epochs = self._run.order.epochs(self._examples_seen(step))
            row |= {f"data/epoch/{n}": e for n, e in zip(self._config.data.mixture, epochs)}
        row["data/truncated"] = self._data.truncated
        row["storage/failures"] = faults.counts().total()
        self._writer.write(step, row)
        self._progress.show(step, values["loss"], rate, waited)

    def _check_finite(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                raise UserError(f"The {name} is {value} at step {step}. {self._store.way_back()}")

    def _evaluate(self, state: train_state.TrainState, step: int) -> dict[str, float]:
        """Evaluates where it is due; returns the scores, {} where it is not."""
        run = self._run
        if not clock.is_due(step, run.eval_every, run.total_steps):
            return {}
        self._flush()
        jax.block_until_ready(state.step)  # the time of the steps under way is training time
        paused = self._progress.pause()
        results = run.evaluator.run(state.variables)
        if results:
            # Differs from step times batch size where the batch size was changed on the way.
            seen = {"eval/images_seen": self._examples_seen(step)}
            self._writer.write(step, {**results, **seen})
            brief = [*run.evaluator.headlines(), *run.evaluator.means]
            shown = [f"{name} {results[name]:.1%}" for name in brief]
            self._progress.note(f"step {step:,} evaluation  " + "  ".join(shown))
            best = self._config.checkpoint.best_metric
            if best and best not in results and run.evaluator.measures(best):  # else said at start
                self._progress.note(
                    f"checkpoint.best_metric {best} is none of the metrics measured: "
                    f"{', '.join(sorted(results))}."
                )
        self._progress.resume(paused)
        return results

    def _save(
        self,
        state: train_state.TrainState,
        step: int,
        values: train_step.Metrics,
        evaluated: Mapping[str, float],
    ) -> None:
        """Saves a checkpoint; the metrics of its evaluation decide whether it is the best."""
        self._flush()
        self._check_finite(step, metrics.fetch(values))  # waits for the steps under way
        paused = self._progress.pause()
        done = self.progress(step)
        if done.skipped != self._reported:
            self._progress.note(f"Skipped so far: {list_counts(done.skipped)}.")
            self._reported = done.skipped
        meta = {
            **dataclasses.asdict(done),
            "tokenizer": self._run.tokenizer.identity,
            "size": dataclasses.asdict(self._run.net.size),
            "hardware": hardware(self._run.mesh),
            "pairs": len(self._run.source),
            "data": self._run.data,
            "config": workdir.to_plain(self._config),
        }
        self._writer.flush()  # so that a resumed run finds the rows up to here
        self._store.save(state, step, meta, evaluated)
        self._progress.resume(paused)


def list_counts(counts: Mapping[str, int]) -> str:
    """Lists counts, most frequent first: "3 x unreadable image, 1 x empty caption"."""
    return ", ".join(f"{count:,} x {name}" for name, count in Counter(counts).most_common())


def hardware(mesh: Mesh) -> str:
    """Returns number and kind of the devices."""
    return f"{mesh.size} x {jax.devices()[0].device_kind}"
