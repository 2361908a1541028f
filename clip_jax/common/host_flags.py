"""The hosts of a pod that take part in a command."""

import argparse

from clip_jax.errors import UserError


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
