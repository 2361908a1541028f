"""Changes to orbax by which checkpoints go to buckets.

Its releases are pinned to a range in requirements.txt; the tests of whole runs notice changes.
"""

import functools
import logging
import os
import sys
from typing import Any

from clip_jax.storage import faults, remote

# TensorStore's waits between two attempts at a request, in seconds.
_FIRST_WAIT, _LONGEST_WAIT = 1, 32


@functools.cache
def prepare() -> None:
    """Has orbax write to gs:// and s3:// with rights on objects alone, and not try for ever."""
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    # To ask needs rights on the bucket itself. All it is for are the empty folders that remain of
    # deleted checkpoints in a bucket with a hierarchical namespace.
    gcs_utils.is_hierarchical_namespace_enabled = lambda path: False
    # The rest of what it does for gs:// is right for s3:// too: mark a checkpoint as complete by a
    # file, since there are no renames, and have TensorStore write the arrays.
    gcs_utils.is_gcs_path = lambda path: remote.is_remote(_repaired(path.as_posix()))
    gcs_utils.get_kvstore_for_gcs = lambda ckpt_path: _kvstore(_repaired(ckpt_path))
    tensorstore_utils._use_gcs_driver = lambda directory: remote.is_remote(directory)
    tensorstore_utils._normalize_path = lambda path: _repaired(os.path.normpath(path))
    retries = {
        "max_retries": faults.requests_in(_LONGEST_WAIT),
        "initial_delay": f"{_FIRST_WAIT}s",
        "max_delay": f"{_LONGEST_WAIT}s",
    }
    for context in (
        tensorstore_utils._BASE_TS_CONTEXT,
        tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT,
    ):
        context |= {"gcs_request_retries": retries, "s3_request_retries": retries}
    _say_failures_once()


# Why saves failed on this host. The manager raises it only once all hosts have met, which they do
# not where one has failed.
failures: list[BaseException] = []


def _say_failures_once() -> None:
    """Leaves out the tracebacks that a failed save makes in every thread that takes part.

    What failed comes out of the manager too, and is told in a line where that is called.
    """

    def wanted(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None or not faults.is_failure(error):
            return True
        if "background save thread" in record.getMessage():
            failures.append(error)
        return False

    for name in ("absl", "asyncio", "gcsfs"):
        logging.getLogger(name).addFilter(wanted)
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        # TensorStore's, when a request ends that orbax no longer waits for.
        if str(unraisable.exc_value) != "Event loop is closed":
            usual(unraisable)

    sys.unraisablehook = hook


def _repaired(path: str) -> str:
    """A path with the slash that normalising it takes away."""
    for scheme in remote.SCHEMES:
        if path.startswith(f"{scheme}:/") and not path.startswith(f"{scheme}://"):
            return path.replace(":/", "://", 1)
    return path


def _kvstore(path: str) -> dict[str, Any]:
    return remote.kvstore_spec(*remote.split(path))
