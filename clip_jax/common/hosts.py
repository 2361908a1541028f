"""The hosts of a run, and what they do one before the others."""

import contextlib
from collections.abc import Iterator

import jax

_LONGEST = 24 * 3600  # seconds that hosts wait for the first; an index of a large set takes hours


@contextlib.contextmanager
def first_host_first(what: str) -> Iterator[None]:
    """Has the first host do something that the others then find done, such as an index.

    Args:
      what: it is, unique within a run.
    """
    if jax.process_index() != 0:
        _meet(what)
    try:
        yield
    finally:  # the others meet the same error by themselves
        if jax.process_index() == 0:
            _meet(what)


def _meet(what: str) -> None:
    if jax.process_count() == 1:
        return
    # Not by a collective of the devices: those give up after some minutes.
    from orbax.checkpoint import multihost

    multihost.get_barrier_sync_fn()(key=f"clip_jax: {what}", timeout_ms=_LONGEST * 1000)
