"""Trains a grid of settings, and fits loss and error as a power of compute.

    python -m clip_jax sweep --config=quickstart --workdir=runs/sweep \\
        --grid="model.size.image_width=48,96,192" --grid="duration=250 steps,500 steps,1000 steps"

Every combination of the grid's values is a run, in a folder of its own in the workdir. They are
trained one after the other; the same command resumes: a finished run is not repeated, an
interrupted one goes on. Settings in one --grid, joined by a semicolon, change together:

    --grid="model.size.image_width=48,96; model.size.text_width=32,64"

On a cluster, --dry_run prints a command for each run, one a line, and nothing else to standard
output; or each job runs the sweep with --only=NUMBER, counted from 1. --report tells of those that
are finished, and trains nothing. Any setting can be given, as in --config.batch_size=256.

The compute of a run is the operations of its matrix products and convolutions, forward and
backward, whatever it masks or recomputes. The law is fitted to the best runs only, those that no
other beats with as much compute or less; runs that differ in the seed alone are averaged before.
"""

import shlex
import sys
from collections.abc import Sequence

from absl import flags
from etils import epath

from clip_jax.common import commands, config_file, output
from clip_jax.errors import ExitCode, UserError
from clip_jax.storage import locations, writing
from clip_jax.sweep import grid
from clip_jax.sweep.grid import GridRun
from clip_jax.training import cli as training

FIGURE = "sweep.png"  # inside the workdir
_INTERRUPTED = "Interrupted. Run the same command again to resume the run that was under way."


def main(arguments: list[str]) -> None:
    """Runs the command; ends the process where it must."""
    if {"-h", "--help", "--helpfull"} & set(arguments):
        with output.ends_unread():
            print(config_file.help_text(__doc__ or "", define))
        return
    training.prepare_process()
    with output.outlived(), commands.plain_errors(_INTERRUPTED, threads_may_hang=True):
        code = _run(arguments)
    sys.exit(code)


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string(
        "workdir",
        None,
        "Directory of the runs: local, gs:// or s3://. Default: runs/, the config's name, -sweep.",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "grid",
        None,
        "An axis of the grid, SETTING=VALUE,VALUE; for further axes",
        flag_values=values,
    )
    flags.DEFINE_list(
        "fit",
        None,
        "Metrics to report, as in metrics.jsonl. Of a score, such as zeroshot/top1, the error is "
        "told. Default: train/loss and the config's checkpoint.best_metric.",
        flag_values=values,
    )
    flags.DEFINE_integer("only", None, "Train this run alone, from 1.", 1, flag_values=values)
    flags.DEFINE_bool(
        "dry_run", False, "Print the command of every run, and train none.", flag_values=values
    )
    flags.DEFINE_bool("report", False, "Report only, train nothing.", flag_values=values)


def parse(arguments: Sequence[str]) -> tuple[config_file.CommandLine, list[GridRun]]:
    """Reads a command line, and makes the runs of its grid.

    Raises:
      UserError: something in it is wrong.
    """
    given = config_file.parse(arguments, grid.COMMAND, define)
    own = flags.FlagValues()
    own.set_gnu_getopt()
    define(own)
    words = own([grid.COMMAND, *arguments], known_only=True)[1:]
    runs = grid.make_runs(words, given.flags["grid"] or [])
    only = given.flags["only"]
    if only is not None and only > len(runs):
        raise UserError(f"--only={only}, but the grid has {len(runs)} runs.")
    return given, runs


def _run(arguments: Sequence[str]) -> int:
    given, runs = parse(arguments)
    name = given.flags["workdir"] or f"{training.default_workdir(given.name)}-sweep"
    only = given.flags["only"]
    chosen = runs if only is None else [runs[only - 1]]
    if given.flags["dry_run"]:
        for run in chosen:
            print(_command(run, locations.parse(name) / run.name))
        return ExitCode.DONE
    directory = locations.reachable(name)
    done = [run for run in runs if _is_finished(run, directory / run.name)]
    failed: dict[str, str] = {}
    if not given.flags["report"]:
        failed = _train([run for run in chosen if run not in done], directory)
        done = [run for run in runs if _is_finished(run, directory / run.name)]
    _report(runs, done, directory, given.flags["fit"] or [])
    for run, error in failed.items():
        print(f"\n{run} failed: {error}", file=sys.stderr)
    return ExitCode.USER_ERROR if failed else ExitCode.DONE


def _command(run: GridRun, place: epath.Path) -> str:
    return shlex.join(["python", "-m", "clip_jax", "train", *run.words, f"--workdir={place}"])


def _is_finished(run: GridRun, place: epath.Path) -> bool:
    """Returns whether a run is finished.

    Raises:
      UserError: its folder holds a run with other settings.
    """
    from clip_jax.training import train, workdir  # late: a mistyped flag is answered at once

    workdir.check(place, run.config, lambda _: False)
    return (place / train.REPORT).exists()


def _train(runs: Sequence[GridRun], directory: epath.Path) -> dict[str, str]:
    """Trains runs one after the other; returns the errors of those that failed, by name."""
    from clip_jax.training import train

    failed = {}
    for number, run in enumerate(runs, start=1):
        place = directory / run.name
        train.say(f"\nRun {number} of {len(runs)}, in {place}.")
        try:
            train.train(run.config, place, _command(run, place))
        except UserError as error:  # one that diverges does not keep the others from training
            if error.exit_code != ExitCode.USER_ERROR:
                raise
            failed[run.name] = str(error)
            train.say(str(error))
    return failed


def _report(
    runs: Sequence[GridRun], done: Sequence[GridRun], directory: epath.Path, fit: Sequence[str]
) -> None:
    from clip_jax.sweep import figure, results  # with matplotlib and scipy

    if len(done) < len(runs):
        left = ", ".join(run.name for run in runs if run not in done)
        print(f"\n{len(done)} of {len(runs)} runs are finished. Not: {left}.")
    if not done:
        return
    metrics = list(dict.fromkeys(fit)) or results.default_metrics(done[0], directory / done[0].name)
    found = results.merge_seeds([results.read(run, directory / run.name, metrics) for run in done])
    studies = [results.study(found, metric) for metric in metrics]
    print(f"\n{results.table(found, studies)}")
    if len({run.config.batch_size for run in done}) > 1 and any(map(results.is_loss, metrics)):
        print("The loss tells a pair from the others of its batch: compare it at equal batch_size.")
    place = directory / FIGURE
    writing.write(place, figure.draw(found, studies))
    print(f"\nFigure: {place}")
