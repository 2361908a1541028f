"""What both commands share: how a mistake of the user ends them, and the hosts that take part."""

import argparse
import contextlib
import sys
from collections.abc import Iterator

from clip_jax.errors import UserError


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Within it, a mistake of the user ends the process with a paragraph and status 2."""
    try:
        yield
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("\nInterrupted.")


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser for "python -m clip_jax COMMAND"; the description is shown as it stands."""
    return argparse.ArgumentParser(
        prog=f"python -m clip_jax {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_hosts(made: argparse.ArgumentParser) -> None:
    """Adds the flags by which a command knows the other hosts."""
    add = made.add_argument
    add(
        "--coordinator",
        default="",
        metavar="HOST:PORT",
        help='on a pod: of its first host, or "auto" where the cluster tells (Cloud TPU, SLURM); '
        "not needed where hosts have accelerators of their own",
    )
    add("--processes", type=int, default=1, metavar="N", help="hosts; not with auto")
    add("--process", type=int, default=0, metavar="I", help="which this is, from 0; not with auto")


def join_hosts(options: argparse.Namespace) -> tuple[int, int]:
    """Joins the other hosts where a coordinator is named.

    Returns:
      Which host this is, and how many there are.

    Raises:
      UserError: there cannot be such a host.
    """
    import jax

    if options.coordinator == "auto":
        jax.distributed.initialize()
        return jax.process_index(), jax.process_count()
    if not 0 <= options.process < options.processes:
        raise UserError(
            f"--process={options.process} is none of --processes={options.processes} hosts: they "
            f"are numbered from 0 to {options.processes - 1}."
        )
    if options.coordinator:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    return options.process, options.processes
