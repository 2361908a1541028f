"""Saves of several hosts, which succeed on all of them or fail on all.

Orbax's hosts wait for each other at barriers that know no failure: one that fails never comes to
them, and the others wait there for minutes. Here every host comes, and tells how it went. What one
host cannot write is then given up by all, and tried again by all.
"""

import asyncio
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import future
from orbax.checkpoint._src.checkpointers import async_checkpointer
from orbax.checkpoint._src.path import atomicity

from clip_jax.common import hosts
from clip_jax.errors import StorageError
from clip_jax.storage import faults

_WITHIN = 600.0  # seconds
_numbers = {kind: itertools.count() for kind in ("directories", "arrays", "rename", "end")}


def prepare() -> None:
    """Changes how orbax's hosts wait for each other; does nothing on one host."""
    if jax.process_count() > 1:
        atomicity.create_all = _create_all
        async_checkpointer._background_wait_for_commit_futures = _commit


def agree(kind: str, error: Exception | None, timeout: float = _WITHIN) -> Exception | None:
    """Returns an error where any host has one: this host's own first; every host must call it.

    Args:
      kind: one of `_numbers`; the calls of each kind are in the same order on all hosts.
      error: error of this host; None: it has none.
      timeout: seconds to wait for the other hosts.
    """
    own = "" if error is None else faults.explain(error)
    told = hosts.exchange(f"clip_jax/save/{kind}", next(_numbers[kind]), json.dumps(own), timeout)
    elsewhere = ((host, text) for host, text in enumerate(map(json.loads, told)) if text)
    return error or next((StorageError(f"Host {host}: {text}") for host, text in elsewhere), None)


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


async def _create_all(paths: Sequence[Any], *, multiprocessing_options: Any = None) -> None:
    """Creates the temporary directories of a save, as orbax's function of this name does."""
    del multiprocessing_options
    error = None
    if jax.process_index() == 0:
        try:
            await asyncio.gather(*(path.create() for path in paths))
        except Exception as raised:
            error = raised
    _raise(agree("directories", error))


def _commit(
    directory: epath.Path,
    commit_futures: Sequence[Any],
    on_commit_callback: Callable[[], None],
    *,
    timeout_secs: int,
    **_: Any,
) -> None:
    """Waits until a save is written, and completes it; in the thread of a save."""
    del directory
    written = future.ChainedFuture(commit_futures, cb=lambda: None)
    error = _attempt(lambda: written.result(timeout=timeout_secs))
    _raise(agree("arrays", error, timeout_secs))
    first = jax.process_index() == 0
    _raise(agree("rename", _attempt(on_commit_callback) if first else None, timeout_secs))


def _attempt(action: Callable[[], Any]) -> Exception | None:
    try:
        action()
    except Exception as error:
        return error
    return None
