"""tf.data around Python: rows loaded by many threads, in order, as batches."""

import atexit
import contextlib
import os
import sys
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np


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

Row = dict[str, Any]  # arrays and NumPy scalars

_open: weakref.WeakSet[Generator] = weakref.WeakSet()


def batches(
    load: Callable[[int], Row],
    like: Row,
    *,
    count: int | None,
    batch_size: int,
    threads: int,
    prefetch: int,
) -> Generator[dict[str, np.ndarray], None, None]:
    """Batches of load(0), load(1), ... in this order.

    Args:
      load: called from `threads` threads at once; what it raises is raised here.
      like: a row of zeros, for its shapes and dtypes.
      count: number of rows, None: without end; an incomplete last batch is dropped.
      batch_size: rows in a batch.
      threads: 0: one per CPU core.
      prefetch: batches held ready.
    """
    return closed_at_exit(_batches(load, like, count, batch_size, threads, prefetch))


def closed_at_exit(generator: Generator) -> Generator:
    """Has the generator closed before the interpreter shuts down.

    Else threads of TensorFlow that want to call Python then wait for ever, and so does the exit.
    """
    _open.add(generator)
    return generator


@atexit.register
def _close_all() -> None:
    # Twice: one that runs in the thread of another can be closed only after that one.
    for generator in (*_open, *_open):
        with contextlib.suppress(ValueError):  # it is running
            generator.close()


def _batches(
    load: Callable[[int], Row],
    like: Row,
    count: int | None,
    batch_size: int,
    threads: int,
    prefetch: int,
) -> Generator[dict[str, np.ndarray], None, None]:
    # An error raised in tf.data would come out as a page of TensorFlow's; so it goes round it.
    errors: list[Exception] = []

    def call(number: np.ndarray) -> list[np.ndarray]:
        if errors:
            return [*like.values()]
        try:
            row = load(int(number))
        except Exception as error:
            errors.append(error)
            return [*like.values()]
        return [row[name] for name in like]

    def load_row(number: tf.Tensor) -> dict[str, tf.Tensor]:
        values = tf.numpy_function(call, [number], [zeros.dtype for zeros in like.values()])
        row = dict(zip(like, values))
        return {name: tf.ensure_shape(row[name], zeros.shape) for name, zeros in like.items()}

    # A pool of its own and no autotuning: the rate stays the same from pass to pass. Fused with
    # map, batch would hold two batches more than `prefetch`.
    threads = threads or os.cpu_count() or 1
    options = tf.data.Options()
    options.autotune.enabled = False
    options.experimental_optimization.map_and_batch_fusion = False
    options.threading.private_threadpool_size = threads
    dataset = (
        tf.data.Dataset.range(2**62 if count is None else count)
        .map(load_row, num_parallel_calls=threads, deterministic=True)
        .batch(batch_size, drop_remainder=True)
        .prefetch(prefetch)
        .with_options(options)
    )
    for batch in dataset.as_numpy_iterator():
        if errors:
            raise errors[0]
        yield batch
