"""The training loop: steps, and between them logs, evaluations and checkpoints."""

import contextlib
import dataclasses
import math
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
from clip_jax.training.record import Record
from clip_jax.training.requests import Request, Requests


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
    checkpoint_every: int  # steps; 0: by the clock, or only at the end

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
    seconds_by_phase: Mapping[str, float] = dataclasses.field(default_factory=dict)
    evaluation_due: bool = False  # the run was stopped before the evaluation of this step was done

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> "ResumeState":
        """Reads the metadata of a checkpoint; an earlier version's has not all fields."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: meta[name] for name in names if name in meta})


class _Interrupted(Exception):
    """The evaluation was ended, since the run is asked to stop."""


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
        requests: Requests,
        record: Record,
    ):
        """Opens the logs in `directory`.

        Args:
          run: the parts that do not change.
          config: the whole config.
          directory: the workdir.
          store: its checkpoints.
          data: training data, from where `resume_state` ended.
          resume_state: progress of the runs that this one resumes.
          requests: what is asked of the run from outside.
          record: the record of this start.
        """
        self._run, self._config, self._store = run, config, store
        self._data, self._resume_state = data, resume_state
        self._requests, self._record = requests, record
        self._asked = Request(0)  # and not served yet
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
            seconds=before.seconds + sum(self._record.seconds().values()),
            skipped=dict(Counter(before.skipped) + Counter(seen)),
            truncated=before.truncated + truncated,
            seconds_by_phase=self._seconds_by_phase(),
        )

    def _seconds_by_phase(self) -> dict[str, float]:
        """Returns the time of the whole run that led to this state."""
        before, now = self._resume_state.seconds_by_phase, self._record.seconds(self._feed.waited)
        return {name: before.get(name, 0.0) + seconds for name, seconds in now.items()}

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
        run, first = self._run, self._resume_state.step
        evaluated: dict[str, float] | None = {}
        with (
            self._logging(),
            contextlib.closing(self._feed),
            self._requests.deferred(run.mesh),
            self._record.during("train"),
        ):
            if self._resume_state.evaluation_due:
                evaluated = self._evaluate(state, first)
                if evaluated is None:
                    raise self._requests.stopped(first)
            for step, batch in zip(range(first + 1, run.total_steps + 1), self._feed):
                state, values = step_fn(state, batch)
                self._flush()  # an earlier step's, so that the device has this one to do meanwhile
                if clock.is_due(step, run.log_every, run.total_steps):
                    self._pending = step, values
                self._asked |= self._requests.poll()
                evaluated = {}
                if clock.is_due(step, run.eval_every, run.total_steps):
                    evaluated = self._evaluate(state, step)
                self._serve(state, step, values, evaluated)
        if not evaluated:  # resumed at the end: only the report is missing, the rows are there
            evaluated = run.evaluator.run(state.variables)
        return evaluated

    def _serve(
        self,
        state: train_state.TrainState,
        step: int,
        values: train_step.Metrics,
        evaluated: Mapping[str, float] | None,
    ) -> None:
        """Saves where that is due, and ends the run where it was asked to; arguments as `_save`."""
        stop = Request.STOP in self._asked
        last = stop or step == self._run.total_steps
        due = clock.is_due(step, self._run.checkpoint_every, 0) or Request.SAVE in self._asked
        if due or last or self._lost(step) or self._store.improves(evaluated or {}):
            self._save(state, step, values, evaluated)
        if last:
            with self._record.during("checkpoint"):
                while not self._store.finish(hurry=Request.STOP in self._asked):
                    self._asked |= self._requests.poll()
                    self._save(state, step, values, evaluated)
        if stop:
            raise self._requests.stopped(step)

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
        seconds = self._record.seconds(self._feed.waited)
        trained = seconds["train"] + seconds["data"]
        rate, waited = self._progress.measure(step, trained, self._feed.waited)
        self._record.reached(step, self._feed.waited)
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
        row |= {f"time/{name}": value for name, value in self._seconds_by_phase().items()}
        self._writer.write(step, row)
        self._progress.show(step, values["loss"], rate, waited)

    def _check_finite(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                raise UserError(f"The {name} is {value} at step {step}. {self._store.way_back()}")

    def _evaluate(self, state: train_state.TrainState, step: int) -> dict[str, float] | None:
        """Evaluates; returns the scores, None where the run is asked to stop meanwhile."""
        run = self._run
        self._flush()
        jax.block_until_ready(state.step)  # the time of the steps under way is training time
        try:
            with self._record.during("evaluation"):
                self._heed()
                results = run.evaluator.run(state.variables, self._heed)
        except _Interrupted:
            return None
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
        return results

    def _heed(self) -> None:
        """Ends the evaluation where the run is asked to stop."""
        self._asked |= self._requests.poll()
        if Request.STOP in self._asked:
            raise _Interrupted

    def _save(
        self,
        state: train_state.TrainState,
        step: int,
        values: train_step.Metrics,
        evaluated: Mapping[str, float] | None,
    ) -> None:
        """Saves a checkpoint.

        Args:
          state: state to save.
          step: its step.
          values: metrics of that step.
          evaluated: metrics of its evaluation, which decide whether it is the best; None: it was
            ended before it was done.
        """
        self._flush()
        self._check_finite(step, metrics.fetch(values))  # waits for the steps under way
        self._record.reached(step, self._feed.waited)
        with self._record.during("checkpoint"):
            self._write(state, step, evaluated)
        self._requests.saved()
        self._asked &= ~Request.SAVE

    def _write(
        self,
        state: train_state.TrainState,
        step: int,
        evaluated: Mapping[str, float] | None,
    ) -> None:
        """Starts to write a checkpoint and its description; arguments as `_save`."""
        done = dataclasses.replace(self.progress(step), evaluation_due=evaluated is None)
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
        self._store.save(state, step, meta, evaluated or {})


def list_counts(counts: Mapping[str, int]) -> str:
    """Lists counts, most frequent first: "3 x unreadable image, 1 x empty caption"."""
    return ", ".join(f"{count:,} x {name}" for name, count in Counter(counts).most_common())


def hardware(mesh: Mesh) -> str:
    """Returns number and kind of the devices."""
    return f"{mesh.size} x {jax.devices()[0].device_kind}"
