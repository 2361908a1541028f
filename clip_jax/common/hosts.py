"""The hosts of a pod: the flags that name them, how they join, and who goes first."""

import argparse
import contextlib
import functools
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

from clip_jax.common import lifeline
from clip_jax.errors import ExitCode, NotJoined, UserError

# Seconds that hosts wait for the first one: the index of a large data set takes hours.
_BARRIER_TIMEOUT = 24 * 3600
_JOIN_TIMEOUT = 300  # seconds until all hosts must have started
_HEARTBEAT_TIMEOUT = 50  # seconds; JAX's own sign of life, where the lifeline does not tell


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
    add("--processes", type=int, metavar="N", help="number of hosts; leave out with auto")
    add(
        "--process",
        type=int,
        metavar="I",
        help="number of this host, from 0; leave out with auto",
    )


def join_hosts(options: argparse.Namespace) -> tuple[int, int]:
    """Joins the other hosts where a coordinator is named.

    Returns:
      This host's number, and the number of hosts.

    Raises:
      UserError: as `join`.
    """
    if options.coordinator:
        return join(options.coordinator, options.processes, options.process)
    process, processes = options.process or 0, options.processes or 1
    _check_number(process, processes)
    return process, processes


def join(coordinator: str, processes: int | None, process: int | None) -> tuple[int, int]:
    """Joins the other hosts; when one ends before its time, so does this process.

    Args:
      coordinator: HOST:PORT of the first host, or "auto".
      processes: number of hosts; None with "auto".
      process: number of this host, from 0; None with "auto".

    Returns:
      This host's number, and the number of hosts.

    Raises:
      UserError: the flags do not fit each other.
      NotJoined: the hosts do not find each other.
    """
    if coordinator != "auto":
        if processes is None or process is None:
            raise UserError(
                "The flag --coordinator=HOST:PORT needs --processes, the number of hosts, and "
                "--process, the number of this one from 0. With --coordinator=auto leave out both."
            )
        _check_number(process, processes)
        _check_address(coordinator, process)
    elif processes is not None or process is not None:
        raise UserError(
            "With --coordinator=auto the cluster tells how many hosts there are: leave out "
            "--processes and --process, or give --coordinator=HOST:PORT of the first host."
        )
    import jax  # late, since --help needs the flags alone
    from jax._src import distributed
    from jax._src.lib import _jax

    # It would take SIGTERM from who wants to hear of it.
    jax.config.update("jax_enable_preemption_service", False)
    # There is no public way to name the callback. Without it JAX ends the process its own way.
    make = getattr(_jax, "get_distributed_runtime_client", None)
    if make is not None:
        lost = lifeline.on_lost_service()
        _jax.get_distributed_runtime_client = functools.partial(
            make, missed_heartbeat_callback=lost
        )
    began = time.monotonic()
    try:
        if coordinator == "auto":
            jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT)
        else:
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                initialization_timeout=_JOIN_TIMEOUT,
                heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
            )
    except Exception as error:
        seconds = time.monotonic() - began
        raise _not_joined(coordinator, processes, process, error, seconds) from error
    finally:
        if make is not None:
            _jax.get_distributed_runtime_client = make
    state = distributed.global_state
    process, processes = state.process_id, state.num_processes
    if processes > 1:
        first = str(state.coordinator_address).rpartition(":")[0].strip("[]")
        try:
            lifeline.start(process, processes, first, state.client)
        except OSError as error:
            who = "Some host has" if process == 0 else f"Host {process} has"
            raise NotJoined(
                f"{who} not connected to the first one, {first}, by a port that the latter chose "
                f"({error}): open all ports between the hosts."
            ) from error
    return process, processes


def _check_number(process: int, processes: int) -> None:
    if not 0 <= process < processes:
        raise UserError(
            f"--process={process} is none of --processes={processes} hosts: they are numbered "
            f"from 0 to {processes - 1}."
        )


def _check_address(coordinator: str, process: int) -> None:
    """Checks HOST:PORT of the first host; there, also that the port is free."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"--coordinator={coordinator} is no HOST:PORT: give name or address of the first host "
            "and a free port of it, as in --coordinator=10.0.0.1:1234."
        )
    # In a cluster that makes the hosts one by one, the first has a name once it is there.
    waits = "KUBERNETES_SERVICE_HOST" in os.environ
    began = time.monotonic()
    while True:
        try:
            socket.getaddrinfo(host.strip("[]"), int(port))
            break
        except OSError as error:
            if not waits or time.monotonic() - began >= _JOIN_TIMEOUT:
                raise NotJoined(
                    f"The first host of --coordinator={coordinator} is not known here ({error}): "
                    "give its name or address as the other hosts know it.",
                    ExitCode.RESUME if waits else ExitCode.USER_ERROR,
                ) from None
        time.sleep(1)
    if process:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(port)))
        except OSError as error:
            raise UserError(
                f"Port {port} of --coordinator={coordinator} cannot be used on this host "
                f"({error}): another run may have it; give every host another one."
            ) from None


def _not_joined(
    coordinator: str, processes: int | None, process: int | None, error: Exception, seconds: float
) -> UserError:
    if coordinator == "auto" and isinstance(error, ValueError):
        return UserError(
            "--coordinator=auto finds no cluster here: it works on Cloud TPU, and under SLURM "
            "within srun. Elsewhere give --coordinator=HOST:PORT of the first host, --processes "
            f"and --process; a single host needs none of them. ({_first_line(error)})"
        )
    if process and seconds < 0.9 * _JOIN_TIMEOUT:  # JAX 0.10 loses the reason on the way to Python
        return NotJoined(
            f"The first host, at --coordinator={coordinator}, refuses host {process} of "
            f"{processes}: another one was started with --process={process} too, or the first one "
            "with another number of --processes. Give every host the number of all hosts as "
            "--processes, and its own as --process, from 0."
        )
    who = "this one" if process is None else f"host {process} of {processes}"
    return NotJoined(
        f"The hosts did not find each other within {_JOIN_TIMEOUT} s: {who} "
        f"waited at --coordinator={coordinator}. Start the same command on every host, "
        "each with its own --process, and let all of them reach that address. See also to why a "
        f"host that is missing has ended. ({_first_line(error)})",
        ExitCode.RESUME,  # it may be on its way, or a scheduler took it away
    )


def _first_line(error: Exception) -> str:
    line = (str(error).splitlines() or [""])[0]
    return "JAX gives no reason" if "bad_cast" in line else line


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


def gather(text: str) -> list[str]:
    """Returns the texts of all hosts; every host must call it."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [text]
    own = text.encode()
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    padded = np.frombuffer(own.ljust(int(sizes.max())), np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row.tobytes()[:size].decode() for row, size in zip(rows, sizes)]


def exchange(key: str, number: int, text: str, timeout: float) -> list[str]:
    """Returns the texts of all hosts, as `gather`, from any thread and without the devices.

    Args:
      key: name of what is told.
      number: number of the call under this key, from 0.
      text: text of this host.
      timeout: seconds to wait for the others.

    Raises:
      TimeoutError: a host has not come in time.
    """
    import jax
    from jax._src import distributed

    state = distributed.global_state
    client: Any = state.client
    place = f"{key}/{number}"
    client.key_value_set(f"{place}/{state.process_id:06}", text)
    try:
        client.wait_at_barrier(place, int(1000 * timeout))
    except jax.errors.JaxRuntimeError as error:
        raise TimeoutError(f"Some host has not come to {place} within {timeout:,.0f} s.") from error
    told = [value for _, value in sorted(client.key_value_dir_get(f"{place}/"))]
    if state.process_id == 0 and number:
        client.key_value_delete(f"{key}/{number - 1}/")  # all have read it, or were not here
    return told


def barrier(key: str) -> None:
    """Waits until all hosts have come here, hours if need be.

    A collective of the devices would give up after some minutes.

    Args:
      key: name of the place, unique within a run.
    """
    from orbax.checkpoint import multihost

    wait = multihost.get_barrier_sync_fn()
    wait(key=f"clip_jax: {key}", timeout_ms=_BARRIER_TIMEOUT * 1000)
