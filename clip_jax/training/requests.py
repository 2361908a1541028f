"""Requests from outside a run: to stop, to save, to trace. All hosts hear them at the same step.

A signal reaches one host, and a clock runs on each. But a checkpoint is written by all hosts, of
one step. So each step is followed by a tiny program on all devices that combines what the hosts
were asked. Its result is read one step later, when it has long been there.

Without the own handlers JAX's preemption service would take SIGTERM, which knows no other request.
"""

import collections
import contextlib
import enum
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clip_jax import sharding
from clip_jax.errors import ExitCode, Stopped


class Request(enum.IntFlag):
    """A request to a run."""

    STOP = 1  # save, and end
    SAVE = 2  # a checkpoint is due by the clock
    TRACE = 4  # record a trace of the next steps


_SIGNALS = {
    signal.SIGTERM: Request.STOP,  # schedulers, before they take the machine away
    signal.SIGHUP: Request.STOP,  # the terminal is closed
    signal.SIGINT: Request.STOP,  # Ctrl-C
    signal.SIGUSR2: Request.TRACE,
}


class Requests:
    """Hears signals and the clock, and tells all hosts of them.

    Before training and after it there is nothing to save, so that a signal ends the process at
    once. Within `deferred` it waits for `poll`; a second Ctrl-C ends the process there too.
    """

    def __init__(self, save_every: float = 0.0):
        """Takes no signal yet.

        Args:
          save_every: seconds between two requests to save; 0: none.
        """
        self.save_every = save_every
        self._saved_at = time.monotonic()
        # Of this host, since the last poll. A queue, since a signal may come in the midst of it.
        self._asked: collections.deque[Request] = collections.deque()
        self._signal: signal.Signals | None = None  # the one that asked this host to stop
        self._deferred = False
        self._share: Callable[[Request], jax.Array] | None = None
        self._shared: jax.Array | None = None  # the requests of all hosts before the last poll

    @contextlib.contextmanager
    def heard(self) -> Iterator["Requests"]:
        """Takes signals while its body runs, except those that the process was told to ignore."""
        before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                    before[number] = signal.signal(number, self._take)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextlib.contextmanager
    def deferred(self, mesh: Mesh) -> Iterator[None]:
        """Leaves requests to `poll` while its body runs.

        Args:
          mesh: devices of all hosts.
        """
        self._share = None if jax.process_count() == 1 else _sharing(mesh)
        self._saved_at = time.monotonic()
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def poll(self) -> Request:
        """Returns what was asked of any host; all hosts call it at the same places.

        On several hosts, what is asked now is returned by the next call.
        """
        asked = Request(0)
        while self._asked:
            asked |= self._asked.popleft()
        if Request.STOP in asked and self._signal:  # not in the handler: it may be within a print
            again = " Ctrl-C once more ends it at once." if self._signal == signal.SIGINT else ""
            print(f"\n{self._signal.name}: saving, then ending.{again}", flush=True)
        due = self.save_every and time.monotonic() - self._saved_at >= self.save_every
        if due and jax.process_index() == 0:
            asked |= Request.SAVE
            self._saved_at = time.monotonic()  # or the next poll, before that save, asks for two
        if self._share is None:
            return asked
        before, self._shared = self._shared, self._share(asked)
        if before is None:
            return Request(0)
        flags = np.asarray(before.addressable_data(0))
        return Request(sum(int(flag) * request for flag, request in zip(flags, Request)))

    def repeat(self, asked: Request) -> None:
        """Has the next polls return once more what could not be served."""
        self._asked.append(asked)

    def saved(self) -> None:
        """Begins the time to the next save."""
        self._saved_at = time.monotonic()

    def stopped(self, step: int) -> Stopped:
        """Returns what to raise once a checkpoint of `step` is written, on all hosts; 0: none."""
        name = self._signal.name if self._signal else "Another host was asked to stop"
        code = ExitCode.INTERRUPTED if self._signal == signal.SIGINT else ExitCode.RESUME
        text = f"{name}: saved at step {step:,}. The same command resumes there."
        if not step:
            text = f"{name}, before the first step. The same command begins again."
        return Stopped(text, code, everywhere=True)

    def _take(self, number: int, frame: FrameType | None) -> None:
        del frame
        request, name = _SIGNALS[signal.Signals(number)], signal.Signals(number).name
        if request is not Request.STOP:
            self._asked.append(request)
            return
        first = self._signal is None
        twice = number == signal.SIGINT and self._signal == signal.SIGINT
        # Kept for `poll` too: what a handler raises within a callback of the garbage collector is
        # printed and lost.
        self._signal = signal.Signals(number)
        self._asked.append(request)
        if number == signal.SIGINT and (twice or not self._deferred):
            raise KeyboardInterrupt
        if first and not self._deferred:  # else it ends already; schedulers like to send it twice
            text = f"{name}, and no step is under way. The same command resumes."
            raise Stopped(text, ExitCode.RESUME)


def _sharing(mesh: Mesh) -> Callable[[Request], jax.Array]:
    """Returns a function that combines the requests of all hosts: int32 [number of kinds]."""
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    local = sum(device.process_index == jax.process_index() for device in mesh.devices.flat)
    combine = jax.jit(lambda flags: flags.max(axis=0), out_shardings=sharding.replicated(mesh))

    def share(asked: Request) -> jax.Array:
        flags = np.tile(np.array([request in asked for request in Request], np.int32), (local, 1))
        with jax.set_mesh(mesh):
            return combine(jax.make_array_from_process_local_data(rows, flags))

    return share
