"""Trains CLIP: python main.py --config=configs/vit_b32.py --workdir=runs/my_run

Run the same command again to resume. A config takes an argument behind a colon: :smoke shrinks it
to seconds on a laptop. Any setting of configs/default.py can be given on the command line, as in
--config.batch_size=4096. On several hosts, start the same command on each with --coordinator.
"""

import os
import pathlib
import shlex
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from clip_jax.errors import DataStalled, StorageError, UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file in configs/, such as configs/quickstart.py or configs/vit_b32.py:smoke."
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where the run is kept: local, gs:// or s3://; default: runs/ and the config's name.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    'On several hosts: HOST:PORT of the first, or "auto" where the cluster tells (Cloud TPU, '
    "SLURM).",
)
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of hosts; not needed with auto.")
_PROCESS = flags.DEFINE_integer("process", None, "Which host this is, from 0; not with auto.")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"Unknown argument {argv[1]!r}: settings are given as --config.NAME=VALUE.")
    logging.set_verbosity(logging.WARNING)
    try:
        _run()
    except (DataStalled, StorageError) as error:
        print(f"\n{error}", file=sys.stderr, flush=True)
        os._exit(1)  # an ordinary exit would wait for threads, or hosts, that hang
    except UserError as error:
        sys.exit(f"\n{error}")
    except Exception as error:
        from clip_jax.storage import faults

        if explained := faults.explained(error):
            sys.exit(f"\n{explained}")
        raise
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. Run the same command again to resume at the last checkpoint.")


def _run() -> None:
    # Imported late: --help and a mistyped flag answer at once.
    import jax

    from configs import default

    config = _CONFIG.value
    default.validate(config)
    if not _COORDINATOR.value and (_PROCESSES.value or _PROCESS.value):
        raise UserError(
            "The flags --processes and --process need --coordinator, HOST:PORT of the first host: "
            "without it each would train alone, all into one workdir."
        )
    if _COORDINATOR.value == "auto":
        jax.distributed.initialize()
    elif _COORDINATOR.value:
        jax.distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    from clip_jax.training import train

    name = config_flags.get_config_filename(flags.FLAGS["config"])
    workdir = _WORKDIR.value or default_workdir(name)
    train.train(config, workdir, command=shlex.join(["python", *sys.argv]))


def default_workdir(config: str) -> str:
    """ "configs/vit_b32.py:smoke" -> "runs/vit_b32-smoke"."""
    path, _, argument = config.partition(":")
    return "runs/" + pathlib.Path(path).stem + (f"-{argument}" if argument else "")


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses flags; a mistyped one ends in a sentence, not in a traceback."""
    try:
        rest = flags.FLAGS(argv)
        _CONFIG.value.keys()  # read now, so that a missing file shows here
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        reason = (error.args or [error])[-1] if isinstance(error, KeyError) else error
        reason = str(reason).strip().splitlines()[-1].removeprefix("clip_jax.errors.UserError: ")
        sys.exit(
            f"The command line cannot be used: {reason.rstrip('.')}. See --help; every setting "
            f"stands in configs/default.py, and the configs are {', '.join(_known_configs())}."
        )


def _known_configs() -> list[str]:
    folder = pathlib.Path(__file__).parent / "configs"
    return sorted(p.stem for p in folder.glob("*.py") if p.stem not in ("__init__", "default"))


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):  # by itself absl would end this with an error
        app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)
    app.run(main, flags_parser=_parse_flags)
