"""Everything that is not training: python -m clip_jax COMMAND, or --help for the list."""

import sys

from clip_jax import commands

COMMANDS = {
    "data": ("clip_jax.curation.cli", "index, check, describe, pack, de-duplicate, curate data"),
    "plan": ("clip_jax.plan.cli", "memory and speed of a config on a TPU pod, without a TPU"),
}


def main(arguments: list[str] | None = None) -> None:
    """Runs `arguments`; None: those of the process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    footer = "Training is python main.py --config=configs/NAME.py."
    commands.dispatch(COMMANDS, arguments, "python -m clip_jax", footer)


if __name__ == "__main__":
    main()
