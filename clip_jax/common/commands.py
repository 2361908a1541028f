"""Commands by name, loaded on demand, with a common parser and common error messages."""

import argparse
import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping

from clip_jax.errors import UserError

# Name: (module whose main(arguments) runs it, purpose).
Table = Mapping[str, tuple[str, str]]


def dispatch(table: Table, arguments: list[str], prefix: str, footer: str = "") -> None:
    """Runs the command that the first argument names, or lists all of them.

    Args:
      table: the commands.
      arguments: words of the command line behind `prefix`.
      prefix: words before the arguments, for the usage.
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


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Ends the process on a user error, with a paragraph and status 2."""
    try:
        yield
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("\nInterrupted.")
    except Exception as error:
        from clip_jax.storage import faults

        if not (explained := faults.explained(error)):
            raise
        print(f"\n{explained}", file=sys.stderr)
        sys.exit(2)


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """Creates the parser of "python -m clip_jax COMMAND"; the description keeps its lines."""
    return argparse.ArgumentParser(
        prog=f"python -m clip_jax {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _usage(table: Table, prefix: str, footer: str) -> str:
    lines = [f"{prefix} COMMAND [--help] ...", ""]
    lines += [f"  {name:<10} {purpose}" for name, (_, purpose) in table.items()]
    return "\n".join([*lines, *(["", footer] if footer else [])])
