"""The command that trains: python -m clip_jax train, or python main.py in a clone."""

import faulthandler
import pathlib
import shlex
import signal

from absl import flags, logging

from clip_jax.common import commands, config_file, hosts, output
from clip_jax.errors import UserError
from clip_jax.training import validation

_ABOUT = """Trains CLIP: {command} --config={example} --workdir=runs/my_run

Run the same command again to resume. A config takes an argument behind a colon: :smoke shrinks it
to seconds on a laptop. Any setting can be given on the command line, as in
--config.batch_size=4096. On several hosts, start the same command on each with --coordinator.
"""


def main(
    arguments: list[str],
    command: str = "python -m clip_jax train",
    example: str = "vit_b32",
) -> None:
    """Runs the command; ends the process where it must.

    Args:
      arguments: those after the command.
      command: command line up to the arguments, for messages and for the report.
      example: value of --config in the help.
    """
    if {"-h", "--help", "--helpfull"} & set(arguments):
        with output.ends_unread():
            print(config_file.help_text(_ABOUT.format(command=command, example=example), _define))
        return
    prepare_process()
    interrupted = "Interrupted. Run the same command again to resume at the last checkpoint."
    with output.outlived(), commands.plain_errors(interrupted, threads_may_hang=True):
        _run(config_file.parse(arguments, command, _define), f"{command} {shlex.join(arguments)}")


def prepare_process() -> None:
    """Prepares logging and faulthandler, as absl's own app.run does it."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # until the watchdog hears it, who knows more
    logging.use_absl_handler()
    # Its flags, which are not ours, count as read, or its first warning says that they are not.
    flags.FLAGS.mark_as_parsed()
    flags.FLAGS.logtostderr = True
    logging.set_verbosity(logging.WARNING)


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "workdir",
        None,
        "Directory of the run: local, gs:// or s3://. Default: runs/ and the config's name.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "coordinator",
        None,
        'On several hosts: HOST:PORT of the first, or "auto" where the cluster tells (Cloud TPU, '
        "SLURM).",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "processes",
        None,
        "Number of hosts (loader processes are --config.data.processes); leave out with auto.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "process", None, "Number of this host, from 0; leave out with auto.", flag_values=values
    )


def _run(given: config_file.CommandLine, command: str) -> None:
    validation.validate(given.config)
    coordinator, processes, process = (
        given.flags[name] for name in ("coordinator", "processes", "process")
    )
    if not coordinator and (processes is not None or process is not None):
        raise UserError(
            "The flags --processes and --process need --coordinator, HOST:PORT of the first host: "
            "without it each would train alone, all into one workdir."
        )
    if coordinator:
        hosts.join(coordinator, processes, process)
    from clip_jax.training import stages  # late: --help and a mistyped flag answer at once

    stages.train_all(given.config, given.flags["workdir"] or default_workdir(given.name), command)


def default_workdir(config: str) -> str:
    """Returns "runs/vit_b32-smoke" for "configs/vit_b32.py:smoke"."""
    path, _, argument = config.partition(":")
    return "runs/" + pathlib.Path(path).stem + (f"-{argument}" if argument else "")
