"""Traces of training steps for XProf: which operation takes how long, on devices and host."""

import contextlib
import logging
import pathlib
import re
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import jax
from etils import epath

from clip_jax.storage import locations, writing

FOLDER = "traces"  # inside the workdir
_PIN = re.compile(r"libtpu==([\d.]+\.)\*")  # in what JAX requires on a TPU
_CLOSE_TIMEOUT = 10.0  # seconds for the files of the last trace at the end of a run


def mismatch() -> str:
    """Returns why a trace would crash this process; "": it would not.

    XLA's profiler asks libtpu too, wherever that is loaded, also without a TPU. A libtpu with a
    profiler of another version than jaxlib's ends the process by SIGSEGV.
    """
    with contextlib.suppress(OSError, metadata.PackageNotFoundError):
        if "/libtpu.so" not in pathlib.Path("/proc/self/maps").read_text():
            return ""
        there = metadata.version("libtpu")
        pins = map(_PIN.match, metadata.requires("jax") or [])
        wanted = next((pin[1] for pin in pins if pin), "")
        if not f"{there}.".startswith(wanted):
            return (
                f"the profiler of libtpu {there} would crash JAX {jax.__version__}, which asks for "
                f"another: pip install 'libtpu=={wanted}*'."
            )
    return ""


class Tracer:
    """Records a few steps, when they are due or asked for; a failure never ends the run.

    Every host records the same steps. The files go to WORKDIR/traces, laid out as XProf and
    TensorBoard expect.
    """

    def __init__(
        self, directory: epath.PathLike, *, due: int, steps: int, say: Callable[[str], None]
    ):
        """Records nothing yet.

        Args:
          directory: the workdir; local, gs:// or s3://.
          due: first step to record without being asked; 0: none.
          steps: number of steps in a trace.
          say: shows a sentence to the user.
        """
        self._directory = locations.parse(directory) / FOLDER
        self._due, self._steps, self._say = due, steps, say
        self._first: int | None = None  # step of the trace under way
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._writing: threading.Thread | None = None

    def start(self, step: int) -> None:
        """Begins a trace before a step, unless one is under way."""
        if self._first is not None:
            return
        if reason := mismatch():
            logging.warning("No trace of step %d: %s", step, reason)
            return
        self._scratch = tempfile.TemporaryDirectory(prefix="clip_jax-trace-")
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of Python would make the files huge
        try:
            jax.profiler.start_trace(self._scratch.name, profiler_options=options)
        except Exception as error:  # such as another trace of this process
            self._scratch.cleanup()
            logging.warning("No trace of step %d could be begun: %s", step, error)
            return
        self._first = step

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Marks a step in the trace, which begins with it if it is due."""
        if step == self._due:
            self.start(step)
        if self._first is None:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def after(self, step: int, outputs: Any) -> None:
        """Ends the trace after its last step, once the devices have computed its outputs."""
        if self._first is not None and step >= self._first + self._steps - 1:
            with contextlib.suppress(Exception):  # the loop meets it too, and says so
                jax.block_until_ready(outputs)
            self.stop()

    def stop(self) -> None:
        """Ends the trace under way, if there is one; its files are written in the background."""
        if self._first is None:
            return
        first, self._first = self._first, None
        scratch = self._scratch
        assert scratch is not None
        try:
            jax.profiler.stop_trace()
        except Exception as error:
            logging.warning("The trace from step %d on could not be ended: %s", first, error)
            return
        self._writing = threading.Thread(target=self._write, args=[first, scratch], daemon=True)
        self._writing.start()

    def close(self) -> None:
        """Ends the trace under way, and waits for the files of the last, but not for long."""
        self.stop()
        if self._writing is not None:
            self._writing.join(_CLOSE_TIMEOUT)

    def _write(self, first: int, scratch: "tempfile.TemporaryDirectory[str]") -> None:
        run = self._directory / "plugins" / "profile" / f"step_{first:08}"
        # A name per process: several may be on one host.
        name = f"{socket.gethostname()}.{jax.process_index()}.xplane.pb"
        try:
            with scratch as folder:
                for file in pathlib.Path(folder).rglob("*.xplane.pb"):
                    writing.write(run / name, file.read_bytes())
        except Exception as error:
            logging.warning("The trace from step %d on could not be written: %s", first, error)
            return
        self._say(
            f"Traced from step {first:,} on: {run}. To look at it: pip install xprof, then "
            f"xprof --logdir {self._directory}."
        )
