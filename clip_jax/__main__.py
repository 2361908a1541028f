"""Everything that is not training: python -m clip_jax COMMAND, or --help for the list."""

import importlib
import sys

# Command: module whose main(arguments) runs it, what it is for. Loaded only when asked for.
COMMANDS = {
    "plan": ("clip_jax.plan.cli", "memory and speed of a config on a TPU pod, without a TPU"),
}


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "help"):
        print(_usage())
    elif command in COMMANDS:
        importlib.import_module(COMMANDS[command][0]).main(arguments[1:])
    else:
        known = ", ".join(COMMANDS)
        sys.exit(f"There is no command {command!r}: choose one of {known}, or --help.")


def _usage() -> str:
    lines = [f"  {name:<10} {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "python -m clip_jax COMMAND [--help] ...",
            "",
            *lines,
            "",
            "Training is python main.py --config=configs/NAME.py.",
        ]
    )


if __name__ == "__main__":
    main()
