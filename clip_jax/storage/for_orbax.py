"""Changes to orbax by which checkpoints go to buckets, and leave less memory behind.

Its releases are pinned to a range in requirements.txt; the tests of whole runs detect changes.
"""

import functools
import logging
import os
import sys
from typing import Any

from clip_jax.storage import faults, remote

# Waits of TensorStore between two attempts at a request, in seconds.
_FIRST_WAIT, _LONGEST_WAIT = 1, 32


@functools.cache
def prepare() -> None:
    """Makes orbax write to gs:// and s3:// with rights on objects alone, and stop retrying."""
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    # The question needs rights on the bucket itself. The answer matters only for the empty folders
    # that deleted checkpoints leave in a bucket with a hierarchical namespace.
    gcs_utils.is_hierarchical_namespace_enabled = lambda path: False
    # Its other code for gs:// is right for s3:// too: it marks a checkpoint as complete by a file,
    # since there are no renames, and has TensorStore write the arrays.
    gcs_utils.is_gcs_path = lambda path: remote.is_remote(_repaired(path.as_posix()))
    gcs_utils.get_kvstore_for_gcs = lambda ckpt_path: _kvstore(_repaired(ckpt_path))
    tensorstore_utils._use_gcs_driver = lambda directory: remote.is_remote(directory)
    # Metrics that nobody reads here, and whose Python objects TensorStore 0.1.86 never frees.
    tensorstore_utils.get_tensorstore_raw_bytes = lambda direction=None: 0
    tensorstore_utils._normalize_path = lambda path: _repaired(os.path.normpath(path))
    retries = {
        "max_retries": faults.attempts_in(_LONGEST_WAIT),
        "initial_delay": f"{_FIRST_WAIT}s",
        "max_delay": f"{_LONGEST_WAIT}s",
    }
    for context in (
        tensorstore_utils._BASE_TS_CONTEXT,
        tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT,
    ):
        context |= {"gcs_request_retries": retries, "s3_request_retries": retries}
    _log_failures_once()


def _log_failures_once() -> None:
    """Suppresses the tracebacks that every thread of a failed save logs.

    The manager raises the error too, and its caller logs it in one line.
    """

    def wanted(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return error is None or not (faults.is_failure(error) or faults.local_reason(error))

    for name in ("absl", "asyncio", "gcsfs"):
        logging.getLogger(name).addFilter(wanted)
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        # Raised by TensorStore when a request ends that orbax no longer waits for.
        if str(unraisable.exc_value) != "Event loop is closed":
            usual(unraisable)

    sys.unraisablehook = hook


def _repaired(path: str) -> str:
    """Restores the slash of a path that normalising it removes."""
    for scheme in remote.SCHEMES:
        if path.startswith(f"{scheme}:/") and not path.startswith(f"{scheme}://"):
            return path.replace(":/", "://", 1)
    return path


def _kvstore(path: str) -> dict[str, Any]:
    return remote.kvstore_spec(*remote.split(path))
