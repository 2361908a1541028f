"""Commands by name, loaded only when asked for."""

import importlib
import sys
from collections.abc import Mapping

# Name: (module whose main(arguments) runs it, what it is for).
Table = Mapping[str, tuple[str, str]]


def dispatch(table: Table, arguments: list[str], prefix: str, footer: str = "") -> None:
    """Runs the command that the first argument names, or lists all of them.

    Args:
      table: of the commands.
      arguments: of the command line, behind `prefix`.
      prefix: what stands before them, for the usage.
      footer: last line of the usage.
    """
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(_usage(table, prefix, footer))
    elif name in table:
        importlib.import_module(table[name][0]).main(arguments[1:])
    else:
        sys.exit(
            f"There is no command {name!r}: choose one of {', '.join(table)}, or {prefix} --help."
        )


def _usage(table: Table, prefix: str, footer: str) -> str:
    lines = [f"{prefix} COMMAND [--help] ...", ""]
    lines += [f"  {name:<10} {purpose}" for name, (_, purpose) in table.items()]
    return "\n".join([*lines, *(["", footer] if footer else [])])
