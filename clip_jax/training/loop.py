"""The training loop: steps, and between them logs, evaluations and checkpoints."""

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping

import jax

from clip_jax import checkpoint, sharding
from clip_jax import state as train_state
from clip_jax.common import clock, metrics, output, trackers
from clip_jax.data import pipeline
from clip_jax.data.feed import Feed
from clip_jax.data.order import Weighted
from clip_jax.errors import StorageError, UserError
from clip_jax.storage import faults
from clip_jax.training import lease, skips, workdir
from clip_jax.training import step as train_step
from clip_jax.training.record import Record
from clip_jax.training.requests import Request, Requests
from clip_jax.training.run import EMA, ResumeState, Run, hardware, list_counts
from clip_jax.training.telemetry import Telemetry
from clip_jax.training.tracer import Tracer
from clip_jax.training.watchdog import Watchdog


class _Interrupted(Exception):
    """The evaluation was ended, since the run is asked to stop."""


class Loop:
    """Runs the steps, and between them logs, evaluations and checkpoints."""

    def __init__(
        self,
        run: Run,
        store: checkpoint.Checkpoints,
        data: pipeline.TrainPipeline,
        resume_state: ResumeState,
        requests: Requests,
        record: Record,
        held: lease.Lease,
    ):
        """Opens the logs in the workdir.

        Args:
          run: the parts that do not change.
          store: its checkpoints.
          data: training data, from where `resume_state` ended.
          resume_state: progress of the runs that this one resumes.
          requests: what is asked of the run from outside.
          record: the record of this start.
          held: the lease of the workdir.
        """
        config, directory = run.config, run.directory
        self._run, self._config, self._store = run, config, store
        self._directory, self._data, self._resume_state = directory, data, resume_state
        self._requests, self._record, self._lease = requests, record, held
        self._asked = Request(0)  # and not served yet
        self._saved = 0  # the step of the last checkpoint that this loop has begun
        self._progress = metrics.Progress(
            resume_state.step, run.total_steps, config.batch_size, record.trained()
        )
        self._writer = metrics.MetricWriter(
            directory,
            tensorboard=config.log.tensorboard,
            start_step=resume_state.step,
            evaluation_due=resume_state.evaluation_due,
            sinks=self._sinks(),
        )
        self._telemetry = Telemetry(run.net.size, config.batch_size, config.data.captions, run.mesh)
        self._tracer = Tracer(
            directory, due=run.trace_at, steps=config.log.trace_steps, say=self._progress.note
        )
        self._pending: tuple[int, train_step.Metrics] | None = None
        self._reported: Mapping[str, int] = resume_state.skipped
        self._skips = skips.Skips(
            config.step.max_skipped,
            config.step.saved_batches,
            counts=resume_state.skipped_steps,
            in_a_row=resume_state.skipped_in_a_row,
            note=self._report_event,
            save=self._save_batch,
        )
        self._feed = Feed(
            data,
            sharding.batch_sharding(run.mesh),
            config.data.prefetch,
            stall_timeout=config.data.stall_timeout,
            describe=self._describe,
            interrupted=self._stop_while_waiting,
        )
        self._watchdog = Watchdog(
            config.step.timeout,
            {
                "data": config.data.stall_timeout,
                "checkpoint": config.checkpoint.give_up_after,
            },
            lambda: "data" if self._feed.waiting else record.phase,
            self._describe,
            directory,
        )

    def _sinks(self) -> list[metrics.Sink]:
        """Starts the trackers of the config."""
        names = trackers.parse(self._config.log.trackers)
        if not names or jax.process_index() != 0:
            return []
        step, rollbacks = self._resume_state.step, self._resume_state.rollbacks
        started = trackers.Trackers(
            names,
            workdir=self._directory,
            project=self._config.log.project,
            start_step=step,
            # The checkpoint gone back to does not know of it, so this is the loop right after.
            went_back=bool(rollbacks) and rollbacks[-1]["to_step"] == step,
            config=workdir.flatten(workdir.to_plain(self._config)),
            hardware=hardware(self._run.mesh),
            say=self._progress.note,
        )
        return [started]

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
            skipped_steps=dict(self._skips.counts),
            skipped_in_a_row=self._skips.in_a_row,
            rollbacks=before.rollbacks,
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
        """Trains to the last step; returns the last evaluation's metrics.

        Raises:
          RollBack: too many steps in a row were skipped.
        """
        run, first = self._run, self._resume_state.step
        evaluated: dict[str, float] | None = {}
        step, values = first, None
        with (
            self._logging(),
            contextlib.closing(self._feed),
            self._requests.deferred(run.mesh),
            self._watchdog.watching(),
            self._record.during("train"),
            contextlib.ExitStack() as stack,
        ):
            stack.callback(self._tracer.close)
            if self._resume_state.evaluation_due:
                evaluated = self._evaluate(state, first)
                if evaluated is None:
                    raise self._requests.stopped(first)
                self._store.rank(first, evaluated)
            for step, batch in zip(range(first + 1, run.total_steps + 1), self._feed):
                self._watchdog.beat(step)
                with self._tracer.step(step):
                    state, values = step_fn(state, batch)
                self._skips.record(step, values)
                self._tracer.after(step, values)
                self._flush()  # an earlier step's, so that the device has this one to do meanwhile
                if clock.is_due(step, run.log_every, run.total_steps):
                    self._pending = step, values
                self._asked |= self._requests.poll()
                if Request.TRACE in self._asked:
                    self._tracer.start(step + 1)
                    self._asked &= ~Request.TRACE
                evaluated = {}
                if clock.is_due(step, run.eval_every, run.total_steps):
                    evaluated = self._evaluate(state, step)
                self._serve(state, step, values, evaluated)
            if step < run.total_steps:  # asked to stop while waiting for the next batch
                self._serve(state, step, values, evaluated)
        if not evaluated:  # resumed at the end: only the report is missing, the rows are there
            evaluated = run.evaluator.run(state.variables)
        return evaluated

    def _serve(
        self,
        state: train_state.TrainState,
        step: int,
        values: train_step.Metrics | None,
        evaluated: Mapping[str, float] | None,
    ) -> None:
        """Saves where that is due, and ends the run where it was asked to.

        Args:
          state: as in `_save`.
          step: likewise.
          values: likewise; None: no step was taken yet, and there is nothing to save.
          evaluated: likewise.
        """
        stop = Request.STOP in self._asked
        last = stop or step == self._run.total_steps
        due = clock.is_due(step, self._run.checkpoint_every, 0) or Request.SAVE in self._asked
        due = due or last or self._lost(step) or self._store.improves(evaluated or {})
        if due and values is not None and step != self._saved:
            self._save(state, step, values, evaluated)
        if last and values is not None:
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
        except skips.RollBack as error:
            self._record.reached(error.last, self._feed.waited)
            self._requests.repeat(self._asked)
            self._writer.close()
            raise
        except BaseException:
            self._writer.flush()
            raise
        self._writer.close()

    def _lost(self, step: int) -> bool:
        """Returns whether the last checkpoint failed and is to be saved again now.

        On several hosts it asks all of them for that, since they may not know it yet.
        """
        lost = clock.is_due(step, self._run.log_every, 0) and self._store.lost()
        if lost and jax.process_count() > 1:
            self._requests.repeat(Request.SAVE)
            return False
        return lost

    def _flush(self) -> None:
        """Writes the pending metrics, once the device has computed them."""
        if self._pending is None:
            return
        step, device_values = self._pending
        self._pending = None
        values = metrics.fetch(device_values)
        self._skips.read(step)
        self._check_finite(step, values)
        rate, waited = self._progress.measure(step, self._record.trained(), self._feed.waited)
        self._record.reached(step, self._feed.waited)
        self._lease.check(if_late=True)
        if news := output.take_news():
            self._record.add(step, news)
        row = {f"train/{name}": value for name, value in values.items() if name != "skipped"}
        if "skipped" in values:
            row["train/skipped_steps"] = self._skips.counts.total()
        row["train/images_per_second"] = rate
        row |= self._telemetry.measure(rate)
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
        if values.get("skipped"):
            return  # the model is as before
        for name in ("loss", *values):  # of several the one that says most
            if not math.isfinite(value := values[name]):
                raise UserError(
                    f"The {name} is {value} at step {step}. {self._store.way_back()} If only a few "
                    "batches do this, the same command with --config.step.nonfinite=skip leaves "
                    "them out."
                )

    def _report_event(self, step: int, text: str) -> None:
        """Shows something that went wrong, and records it."""
        self._progress.note(text)
        self._record.add(step, text)

    def _save_batch(self, step: int) -> str:
        """Saves this host's part of the batch of a skipped step, read once more."""
        path = skips.batch_path(self._directory, step, *sharding.process_part(self._run.mesh))
        try:
            batch = self._data.reread(self._examples_seen(step - 1))
        except (OSError, UserError) as error:
            return f"; its batch could not be read again: {error}"
        return skips.save_batch(path, batch)

    def _evaluate(self, state: train_state.TrainState, step: int) -> dict[str, float] | None:
        """Evaluates; returns the scores, None where the run is asked to stop meanwhile."""
        run = self._run
        self._flush()
        jax.block_until_ready(state.step)  # the time of the steps under way is training time
        try:
            with self._record.during("evaluation"):
                self._heed()
                results = self._measure(state)
        except _Interrupted:
            return None
        if results:
            # Differs from step times batch size where the batch size was changed on the way.
            seen = {metrics.EVALUATED: self._examples_seen(step)}
            self._writer.write(step, {**results, **seen})
            brief = [*run.evaluator.headlines(), *run.evaluator.means]
            brief += [EMA + name for name in brief if EMA + name in results]
            shown = [f"{name} {results[name]:.1%}" for name in brief]
            self._progress.note(f"step {step:,} evaluation  " + "  ".join(shown))
            best = self._config.checkpoint.best_metric
            if best and best not in results and run.measures(best):  # else said at start
                self._progress.note(
                    f"checkpoint.best_metric {best} is none of the metrics measured: "
                    f"{', '.join(sorted(results))}."
                )
        return results

    def _measure(self, state: train_state.TrainState) -> dict[str, float]:
        """Evaluates the parameters, and their moving average where there is one."""
        averaged = {}
        if state.ema is not None:
            averaged = self._run.evaluator.run(state.averaged_variables, self._heed)
        results = self._run.evaluator.run(state.variables, self._heed)  # the last one is reported
        return results | {EMA + name: value for name, value in averaged.items()}

    def _stop_while_waiting(self) -> bool:
        """Returns whether the run is asked to stop; called while it waits for a batch.

        Only of one host: others may have begun the next step, and wait for this one in it.
        """
        if jax.process_count() == 1:
            self._asked |= self._requests.poll()
        return jax.process_count() == 1 and Request.STOP in self._asked

    def _heed(self) -> None:
        """Ends the evaluation where the run is asked to stop."""
        self._watchdog.beat()
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
        self._skips.read(step)
        self._record.reached(step, self._feed.waited)
        with self._record.during("checkpoint"):
            self._lease.check()
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
        self._saved = step
