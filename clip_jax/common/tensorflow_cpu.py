"""TensorFlow for what only it can do: TFDS and TFRecord files.

Import it from here: it then says nothing at import and leaves every GPU to JAX.
"""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Holds back what TensorFlow writes at import, before a log level can reach it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


with _quiet_stderr():
    import tensorflow as tf

    # At import, since it must come before TensorFlow's first operation: else TensorFlow takes the
    # memory of every GPU it sees away from JAX.
    tf.config.set_visible_devices([], "GPU")

__all__ = ["tf"]
