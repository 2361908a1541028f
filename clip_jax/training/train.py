"""A training run from start to end: mesh, model, data, state, restore, loop, report."""

import contextlib
import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from clip_jax import checkpoint
from clip_jax import state as train_state
from clip_jax.common import clock, formatting, metrics, starts
from clip_jax.data import identity, tokenizer
from clip_jax.errors import UserError
from clip_jax.storage import faults, locations
from clip_jax.training import agreement, lease, notices, program, skips, workdir
from clip_jax.training.loop import Loop
from clip_jax.training.record import Record, surroundings
from clip_jax.training.requests import Requests
from clip_jax.training.run import ResumeState, Run, hardware, list_counts, open_data, prepare

# Inside the workdir.
PROGRAMS = "compiled"
REPORT = "report.html"  # written at the end of the run


def train(config: ConfigDict, directory: epath.PathLike, command: str = "") -> dict[str, float]:
    """Trains, or resumes the run in the directory, and writes a report.

    Args:
      config: fields as in configs/default.py, validated.
      directory: the workdir; local, gs:// or s3://.
      command: the user's command line, for the report.

    Returns:
      The metrics of the last evaluation.

    Raises:
      UserError: a fault in config, data or workdir that the user can mend.
    """
    began = time.monotonic()
    directory = locations.reachable(directory)
    notices.check_durations(config)
    requests = Requests(clock.to_seconds(config.checkpoint.every) or 0.0)
    with requests.heard():
        return _train(config, directory, command, requests, began)


def _keep_programs(cache: str, directory: epath.Path) -> None:
    """Keeps compiled programs, so that a run that starts again is soon back at its steps."""
    if cache == "auto":
        if jax.config.values["jax_compilation_cache_dir"]:  # JAX_COMPILATION_CACHE_DIR
            return
        cache = str(directory / PROGRAMS)
    if cache:
        jax.config.update("jax_compilation_cache_dir", str(locations.parse(cache)))
        compilation_cache.reset_cache()  # where a program came before, it has decided on none


def _train(
    config: ConfigDict, directory: epath.Path, command: str, requests: Requests, began: float
) -> dict[str, float]:
    """Trains; arguments as `train`, and the requests to the run and its beginning."""
    if jax.process_count() > 1:  # before the index, which may take hours
        agreement.check_program(config)
        workdir.make(directory)
        agreement.check_workdir(directory)
    _keep_programs(config.compilation_cache, directory)
    run = prepare(config, directory)
    workdir.make(directory)
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(lease.held(directory))
        record = Record(directory, began)

        def report(step: int, text: str) -> None:
            say(text)
            record.add(step, text)

        store = stack.enter_context(
            checkpoint.Checkpoints(
                directory,
                keep=config.checkpoint.keep,
                best_metric=config.checkpoint.best_metric,
                give_up_after=config.checkpoint.give_up_after,
                report=report,
            )
        )
        resumed = store.latest_step()
        source = store
        if resumed is None and config.branch_from:
            source, resumed = _open_branch(config.branch_from, stack)
        if resumed is not None:
            same_rates = functools.partial(_same_rates, run, resumed)
            branch = source is not store
            workdir.check(source.directory.parent, config, same_rates, branch)
        stack.enter_context(record.kept(**_facts(run, command)))
        _announce(run)
        start = _initial_variables(run) if resumed is None else None
        # Early: a step that does not fit into memory is said before anything is read.
        step_fn = None if resumed == run.total_steps else _compile(run, record)
        workdir.write(directory, config)
        if resumed is None:
            resume_state, state = ResumeState(), run.program.init(start)
        else:
            resume_state, state = _restore(run, source, None if source is store else resumed)
            if resume_state.step < run.total_steps and step_fn is None:  # it has fallen back
                step_fn = _compile(run, record)
        record.begins(resume_state.step)
        while True:
            data = open_data(run, resume_state.examples_seen)
            loop = Loop(run, store, data, resume_state, requests, record, held)
            try:
                final = loop.run(state, step_fn)
                done = loop.progress(run.total_steps)
                break
            except skips.RollBack as error:
                # Frames of its traceback hold the state: there is no memory for a second one.
                found = error.with_traceback(None)
            del state
            # Times stay those of the runs before: the record of this start goes on.
            done = dataclasses.replace(
                loop.progress(found.last),
                seconds=resume_state.seconds,
                seconds_by_phase=resume_state.seconds_by_phase,
            )
            resume_state, state = _roll_back(run, store, found, done, record)
    _report(run, done, command, record.began_at)
    return final


def _facts(run: Run, command: str) -> dict[str, Any]:
    """Returns what a start's record says of its run."""
    return {
        "total_steps": run.total_steps,
        "batch_size": run.config.batch_size,
        "command": command,
        "hardware": hardware(run.mesh),
        "hosts": jax.process_count(),
        "mesh": dict(run.mesh.shape),
        **surroundings(),
    }


def _initial_variables(run: Run) -> Any:
    """Reads the model that the run starts from; None: it starts at random."""
    if not run.config.init_from:
        return None
    from clip_jax.training import warm_start  # with readers of all formats of weights

    start = warm_start.initial_variables(run.config, run.net, run.mesh, run.tokenizer)
    say(f"Starting from the model in {run.config.init_from}.")
    return start


def _open_branch(place: str, stack: contextlib.ExitStack) -> tuple[checkpoint.Checkpoints, int]:
    """Opens the run that a new one goes on from, and returns its last step, or the one named."""
    directory, step = checkpoint.split_path(place)
    directory = locations.reachable(directory)
    steps = []
    if (directory / checkpoint.DIRECTORY).is_dir():
        source = stack.enter_context(checkpoint.Checkpoints(directory, create=False))
        steps = source.steps()
        if steps and step in (None, *steps):
            return source, steps[-1] if step is None else step
    found = f"it has those of the steps {', '.join(map(str, steps))}" if steps else "it has none"
    raise UserError(
        f"branch_from {place} is no run with a checkpoint{f' of step {step}' if step else ''}: "
        f"{found}. Give a workdir, or WORKDIR/{checkpoint.DIRECTORY}/STEP."
    )


def _same_rates(run: Run, steps: int, config: ConfigDict) -> bool:
    """Tells whether another config has the same learning rates in the first steps of the run.

    Raises:
      UserError: the run cannot go on with its own batch_size.
    """
    notices.check_branch(config, run.config)
    _, other = program.make_schedule(config, len(run.source))
    first = np.arange(steps)
    return np.array_equal(other(first), run.program.optimizer.schedule(first))


def _restore(
    run: Run, store: checkpoint.Checkpoints, step: int | None
) -> tuple[ResumeState, train_state.TrainState]:
    """Reads the checkpoint of a step; None: the newest that is whole."""
    directory, like = store.directory.parent, run.program.state
    if step is None:
        found = store.restore_latest(like)
    else:
        found = checkpoint.Restored(step, store.read_meta(step), store.restore(step, like))
    resume_state = ResumeState.from_meta(_check_meta(found.meta, run.tokenizer))
    _check_data(found.meta, run)
    if found.step == run.total_steps:
        say(
            f"The run in {directory} is finished, at step {found.step:,}: it is evaluated once "
            "more, for the report. To train on, start another --workdir with "
            f"--config.init_from={directory}; or, with optim.schedule constant or rsqrt, give it a "
            "longer --config.duration."
        )
    else:
        say(f"Resuming {directory} from step {found.step:,}.")
    return resume_state, found.state


def _compile(run: Run, record: Record) -> Callable[..., tuple[train_state.TrainState, Any]]:
    """Compiles the training step, and before it the teachers, whose parameters it reads.

    Raises:
      UserError: the step does not fit into memory, or a teacher is damaged.
    """
    began = time.monotonic()
    running = None
    if run.teachers:
        from clip_jax.training import teachers  # with readers of weights

        running = teachers.Teachers(run.teachers, run.program)
    with record.during("compile"):
        compiled = run.program.lower(running.scales if running else ()).compile()
    beside = running.bytes if running else 0
    _check_memory(compiled.memory_analysis(), run.config.batch_size, beside)
    say(f"Compiled the training step in {formatting.format_seconds(time.monotonic() - began)}.")
    if running is None:
        return compiled
    return lambda state, batch: compiled(state, running(batch, state.step))


def _check_memory(needs: Any, batch_size: int, beside: int) -> None:
    """Raises UserError where a step takes more memory than there is: else the system kills it.

    Args:
      needs: analysis of the compiled step.
      batch_size: pairs of a step.
      beside: bytes on each device that are held beside it, by teachers.
    """
    device = jax.local_devices()[0]
    has = (device.memory_stats() or {}).get("bytes_limit")
    devices = 1
    if has is None:  # a CPU: its devices are all on the memory of the host
        has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        devices = jax.local_device_count()
    needed = devices * (
        beside
        + needs.temp_size_in_bytes
        + needs.argument_size_in_bytes
        + needs.output_size_in_bytes
        - needs.alias_size_in_bytes
    )
    if needed > has:
        raise UserError(
            f"A training step with batch_size {batch_size:,} needs {needed / 2**30:,.1f} GiB, but "
            f"this {device.device_kind} has {has / 2**30:,.1f} GiB. Run it on more devices, take "
            "a smaller --config.batch_size, embed it in pieces (--config.accum_steps=8), add "
            "--config.model.remat=full, or put :smoke behind the config's name for a small version "
            "that runs anywhere."
        )


def _check_meta(meta: dict[str, Any], tokens: tokenizer.Tokenizer) -> dict[str, Any]:
    """Returns the metadata of a checkpoint; UserError where its tokenizer is another."""
    if meta["tokenizer"] != tokens.identity:
        raise UserError(
            f"The checkpoint was trained with the tokenizer {meta['tokenizer']}, the config names "
            f"{tokens.identity}: set --config.tokenizer to the former."
        )
    return meta


def _check_data(meta: Mapping[str, Any], run: Run) -> None:
    """Raises UserError where the checkpoint was trained on other data, unless that is allowed."""
    if "data" not in meta:
        say("The checkpoint is of an earlier version and does not tell the data: not compared.")
        return
    changed = "; ".join(identity.differences(meta["data"], run.data, ("before", "now")))
    if not changed:
        return
    if not run.config.checkpoint.allow_data_change:
        raise UserError(
            f"{run.directory} holds a run on other training data: {changed}. Order, epochs and the "
            "length of the schedule would change. Restore the data, choose another --workdir, "
            "perhaps with --config.init_from, or add --config.checkpoint.allow_data_change=True "
            "to resume on the new data."
        )
    say(f"Resuming on other training data: {changed}.")


def _roll_back(
    run: Run,
    store: checkpoint.Checkpoints,
    found: skips.RollBack,
    done: ResumeState,
    record: Record,
) -> tuple[ResumeState, train_state.TrainState]:
    """Restores the last good checkpoint that is whole, to be resumed past the examples read since.

    Nothing but the next checkpoint stores this: a run that is killed before it takes the same
    steps again, and goes back again.

    Raises:
      UserError: there is none, or the run has gone back too often.
    """
    config, directory = run.config, run.directory
    store.finish()
    good = skips.choose_checkpoint(store.steps(), found.first, done.rollbacks)
    if good is None or len(done.rollbacks) >= config.step.max_rollbacks:
        raise skips.give_up(found, done.skipped_steps, done.rollbacks, config.step, directory)
    good, _, state = store.restore_latest(run.program.state, last=good)
    store.discard_after(good)
    seen = done.examples_seen
    rollback = {"from_step": found.last, "to_step": good, "examples_seen": seen}
    rollbacks = (*done.rollbacks, rollback)
    text = (
        f"Steps {found.first:,} to {found.last:,} were skipped, more in a row than "
        f"step.max_skipped = {config.step.max_skipped} allows: back to step {good:,}, "
        f"and on from there with the examples from {seen:,} on (roll-back {len(rollbacks)} of at "
        f"most {config.step.max_rollbacks})."
    )
    say(text)
    record.add(found.last, text)
    record.went_back(found.last, good)
    return dataclasses.replace(done, step=good, skipped_in_a_row=0, rollbacks=rollbacks), state


def _announce(run: Run) -> None:
    config = run.config
    count = train_state.count_params(run.program.state.params)
    axes = " x ".join(f"{name} {n}" for name, n in run.mesh.shape.items() if n > 1) or "1"
    say(
        f"{run.net.size}: {count / 1e6:,.1f} M parameters, {run.net.dtype.name} compute, "
        f"attention by {run.net.attention}, on {hardware(run.mesh)} (mesh {axes})."
    )
    if summary := run.program.optimizer.factors.summary(run.program.state.params):
        say(summary)
    for teacher in run.teachers:
        described, *_ = teacher.describe().splitlines()
        say(f"Distilling from {described}.")
    if problems := getattr(run.source, "problems", None):
        say(f"Found in the training data: {list_counts(problems)}.")
    for note in run.evaluator.notes:
        say(note)
    with jax.set_mesh(run.mesh):
        found = notices.notices(config, run.net, run.source, run.order, run.total_steps)
    for notice in found:
        say(notice)
    best = config.checkpoint.best_metric
    if best and not run.measures(best):
        say(
            f"No evaluation of this run measures {best}, so only the most recent checkpoints are "
            "kept: set --config.checkpoint.best_metric to a metric of this run."
        )
    steps = f"{run.total_steps:,} steps of {config.batch_size:,} pairs"
    epochs = run.total_steps * config.batch_size / len(run.source)
    steps += f", {epochs:,.1f} epochs" if not config.branch_from else ", those before included"
    say(f"{len(run.source):,} pairs from {_data_name(config.data)}; {steps}.")


def _report(run: Run, done: ResumeState, command: str, started_at: datetime) -> None:
    """Writes report.html, and says where it is."""
    if jax.process_index() != 0:
        return
    from clip_jax.training import report  # with matplotlib

    history = metrics.read_history(run.directory)
    rates = [row["train/images_per_second"] for row in history if "train/images_per_second" in row]
    summary = report.RunSummary(
        title=f"{run.net.size} on {_data_name(run.config.data)}",
        command=command,
        started=started_at.astimezone(),
        finished=datetime.now().astimezone(),
        wall_seconds=done.seconds,
        hardware=hardware(run.mesh),
        params=train_state.count_params(run.program.state.params),
        images_seen=done.examples_seen,
        steps=done.step,
        images_per_second=statistics.median(rates) if rates else 0.0,
        skipped=done.skipped,
        truncated=done.truncated,
        config_text=workdir.to_json(run.config),
        notes=[*run.evaluator.notes, *skips.notes(done.skipped_steps, done.rollbacks)],
    )
    if failures := faults.counts():
        say(f"Storage failed now and then, and was asked again: {list_counts(failures)}.")
    path = run.directory / REPORT
    evaluator = run.evaluator
    past, _ = starts.read(run.directory)
    report.write_report(
        path, summary, history, evaluator.results, evaluator.scores, evaluator.headlines(), past
    )
    say(f"Done in {formatting.format_seconds(done.seconds)}. Report: {path}")


def _data_name(data: ConfigDict) -> str:
    """Returns a name for the training data."""
    return " + ".join(data.mixture) or data.source.name or data.source.type


def say(text: str) -> None:
    """Prints a line, on the first host."""
    if jax.process_index() == 0:
        print(text, flush=True)
