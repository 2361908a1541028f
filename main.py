"""Trains CLIP: python main.py --config=configs/vit_b32.py --workdir=runs/my_run

Run the same command again to resume. A config takes an argument behind a colon: :smoke shrinks it
to seconds on a laptop. Any setting of configs/default.py can be set on the command line, as in
--config.batch_size=4096. On several hosts, start the same command on each with --coordinator.
"""

import os
import pathlib
import shlex
import sys

# Where libtpu is installed without a TPU, or TensorFlow without a GPU, spare their start-up noise.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags, logging
from ml_collections import config_flags

from clip_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file in configs/, such as configs/quickstart.py or configs/vit_b32.py:smoke."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run is kept, local or gs://; default: runs/ and the config's name."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    'On several hosts: HOST:PORT of the first, or "auto" where the cluster tells (Cloud TPU, '
    "SLURM).",
)
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of hosts; not needed with auto.")
_PROCESS = flags.DEFINE_integer("process", None, "Which host this is, from 0; not with auto.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown argument {argv[1]!r}.")
    logging.set_verbosity(logging.WARNING)
    try:
        run()
    except UserError as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. Run the same command again to resume at the last checkpoint.")


def run() -> None:
    import jax

    if _COORDINATOR.value == "auto":
        jax.distributed.initialize()
    elif _COORDINATOR.value:
        jax.distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)

    from clip_jax import train
    from configs import default

    config = _CONFIG.value
    default.validate(config)
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
    workdir = _WORKDIR.value or default_workdir(
        config_flags.get_config_filename(flags.FLAGS["config"])
    )
    train.train(config, workdir, command=shlex.join(["python", *sys.argv]))


def default_workdir(config: str) -> str:
    """ "configs/vit_b32.py:smoke" -> "runs/vit_b32-smoke"."""
    path, _, argument = config.partition(":")
    return "runs/" + pathlib.Path(path).stem + (f"-{argument}" if argument else "")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
