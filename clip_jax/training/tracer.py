"""Traces of training steps for XProf: which operation takes how long, on devices and host."""

import contextlib
import logging
import pathlib
import socket
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from clip_jax.storage import locations, writing

FOLDER = "traces"  # inside the workdir


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

    def start(self, step: int) -> None:
        """Begins a trace before a step, unless one is under way."""
        if self._first is not None:
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
        """Ends the trace under way, if there is one, and writes its files."""
        if self._first is None:
            return
        first, self._first = self._first, None
        assert self._scratch is not None
        try:
            jax.profiler.stop_trace()
            run = self._directory / "plugins" / "profile" / f"step_{first:08}"
            for file in pathlib.Path(self._scratch.name).rglob("*.xplane.pb"):
                # A name per process: several may be on one host.
                name = f"{socket.gethostname()}.{jax.process_index()}.xplane.pb"
                writing.write(run / name, file.read_bytes())
            self._say(
                f"Traced from step {first:,} on: {run}. To look at it: pip install xprof, then "
                f"xprof --logdir {self._directory}."
            )
        except Exception as error:
            logging.warning("The trace from step %d on could not be written: %s", first, error)
        finally:
            self._scratch.cleanup()
