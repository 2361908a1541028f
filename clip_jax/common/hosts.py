"""The hosts of a pod: the flags that name them, how they join, and who goes first."""

import argparse
import contextlib
from collections.abc import Iterator

from clip_jax.errors import UserError

# Seconds that hosts wait for the first one: the index of a large data set takes hours.
_BARRIER_TIMEOUT = 24 * 3600


def add_hosts(parser: argparse.ArgumentParser) -> None:
    """Adds the flags by which a command finds the other hosts."""
    add = parser.add_argument
    add(
        "--coordinator",
        default="",
        metavar="HOST:PORT",
        help='on a pod: address of its first host, or "auto" where the cluster tells (Cloud TPU, '
        "SLURM); not needed where hosts have accelerators of their own",
    )
    add(
        "--processes", type=int, default=1, metavar="N", help="number of hosts; leave out with auto"
    )
    add(
        "--process",
        type=int,
        default=0,
        metavar="I",
        help="number of this host, from 0; leave out with auto",
    )


def join_hosts(options: argparse.Namespace) -> tuple[int, int]:
    """Joins the other hosts where a coordinator is named.

    Returns:
      This host's number, and the number of hosts.

    Raises:
      UserError: --process is not below --processes.
    """
    import jax  # late, since --help needs the flags alone

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


@contextlib.contextmanager
def first_host_first(key: str) -> Iterator[None]:
    """Runs its body on the first host, then on the others.

    The others find done what the first did, such as an index.

    Args:
      key: name of the work, unique within a run.
    """
    import jax  # late, since --help needs the flags alone

    if jax.process_count() == 1:
        yield
        return
    first = jax.process_index() == 0
    if not first:
        barrier(key)
    try:
        yield
    finally:  # the others meet the same error by themselves
        if first:
            barrier(key)


def barrier(key: str) -> None:
    """Waits until all hosts have come here, hours if need be.

    A collective of the devices would give up after some minutes.

    Args:
      key: name of the place, unique within a run.
    """
    from orbax.checkpoint import multihost

    wait = multihost.get_barrier_sync_fn()
    wait(key=f"clip_jax: {key}", timeout_ms=_BARRIER_TIMEOUT * 1000)
