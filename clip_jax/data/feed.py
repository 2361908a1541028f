"""Moves batches onto the device ahead of their use, and measures the time waited for them."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any

import jax
import numpy as np

from clip_jax.data import loading
from clip_jax.errors import DataStalled

_SLICE = 0.5  # seconds between two looks at whether to go on waiting


class Feed:
    """Moves batches onto the mesh ahead of their use, in a thread of its own.

    Iterating yields trees of global jax.Arrays. What `batches` raises is raised here. It ends early
    where it waits for a batch and is `interrupted`.

    Attributes:
      waited: seconds for which the consumer has waited for batches so far.
      waiting: whether it waits for one now.
    """

    def __init__(
        self,
        batches: Iterable[dict[str, np.ndarray]],
        sharding: jax.sharding.Sharding,
        depth: int,
        *,
        stall_timeout: float = float("inf"),
        describe: Callable[[], str] = lambda: "",
        interrupted: Callable[[], bool] = lambda: False,
    ):
        """Starts at the first `next`.

        Args:
          batches: trees of NumPy arrays, the rows of this host.
          sharding: sharding of the global arrays, along their first axis.
          depth: number of batches held ready on the device.
          stall_timeout: seconds without a batch until DataStalled is raised.
          describe: returns the state of the pipeline, for that error.
          interrupted: returns whether to wait no longer; asked about twice a second.
        """
        self.waited, self.waiting = 0.0, False
        self._batches, self._sharding = batches, sharding
        self._stall_timeout, self._describe = stall_timeout, describe
        self._interrupted = interrupted
        self._ready: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        self._generator = loading.closed_at_exit(self._generate())

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> dict[str, jax.Array]:
        return next(self._generator)

    def close(self) -> None:
        """Stops the thread."""
        self._generator.close()

    def _generate(self) -> Generator[dict[str, jax.Array], None, None]:
        thread = threading.Thread(target=self._transfer, name="feed", daemon=True)
        thread.start()
        try:
            while True:
                batch, error = self._wait()
                if isinstance(error, StopIteration):
                    return
                if error is not None:
                    raise error
                yield batch
        finally:
            self._stop.set()
            thread.join(timeout=2)

    def _wait(self) -> tuple[Any, BaseException | None]:
        began, self.waiting = time.monotonic(), True
        deadline = began + self._stall_timeout
        try:
            while (left := deadline - time.monotonic()) > 0:
                with contextlib.suppress(queue.Empty):
                    return self._ready.get(timeout=min(left, _SLICE))
                if self._interrupted():
                    return None, StopIteration()
        finally:
            self.waited += time.monotonic() - began
            self.waiting = False
        raise DataStalled(
            f"No batch of training data has come for {self._stall_timeout:,.0f} s "
            f"(data.stall_timeout). The pipeline: {self._describe()}. If the storage is only "
            "slow, raise --config.data.stall_timeout; else see to what is named, and run the "
            "same command again to resume at the last checkpoint."
        )

    def _transfer(self) -> None:
        try:
            for batch in self._batches:
                self._put((jax.tree.map(self._globalise, batch), None))
                if self._stop.is_set():
                    return
            self._put((None, StopIteration()))
        except BaseException as error:
            self._put((None, error))

    def _put(self, item: tuple[Any, BaseException | None]) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _globalise(self, local: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(self._sharding, local)
