"""Saves that take long or fail: logged, reported, tried again, given up in the end."""

import threading
import time
from collections.abc import Callable

from absl import logging
from etils import epath
from orbax.checkpoint.path import atomicity, atomicity_types

from clip_jax.common import formatting
from clip_jax.errors import StorageError, StorageRefused
from clip_jax.storage import faults, ranges, remote

_LOG_EVERY = 60.0  # seconds
_LONGEST_WAIT = 300.0  # seconds of training between two tries: each costs a copy of the state
_GRACE = 10.0  # seconds in which a save may be tried again once the run is asked to end
_LONGEST_PAUSE = 10.0  # seconds between two tries while nothing else is left to do


class Writes:
    """Monitors saves: logs those that take long, decides on retries, and gives up in the end."""

    def __init__(
        self, directory: epath.Path, give_up_after: float, report: Callable[[int, str], None]
    ):
        """Watches nothing yet.

        Args:
          directory: folder of the checkpoints.
          give_up_after: seconds for which saves may fail.
          report: takes a step and a sentence about saves that fail, and that succeed again.
        """
        self._directory = directory
        self._give_up_after = give_up_after
        self._report = report
        self._step = 0  # of the last save
        self._failing_since: float | None = None
        self._failures = 0  # since the last success
        self._wait = 0.0  # seconds between two tries
        self._retry_at: float | None = None  # None: nothing is lost
        self._done = threading.Event()

    def begin(self, step: int, busy: Callable[[], bool]) -> None:
        """Watches a save until it is no longer `busy`."""
        self.succeeded()  # the one before, or this one would not have begun
        self._step, self._retry_at = step, None
        self._done.set()
        self._done = done = threading.Event()

        def watch() -> None:
            began = logged = time.monotonic()
            while not done.wait(1.0) and busy():
                if (now := time.monotonic()) - logged < _LOG_EVERY:
                    continue
                logged = now
                failures = ", ".join(f"{n} x {name}" for name, n in faults.counts().items())
                logging.warning(
                    "The checkpoint of step %d is not in %s yet, after %.0f s; failures of storage "
                    "so far: %s",
                    step,
                    self._directory,
                    now - began,
                    failures or "none seen",
                )

        threading.Thread(target=watch, name="checkpoint watch", daemon=True).start()

    def hurry(self) -> None:
        """Gives up soon from now on."""
        failing = time.monotonic() - self._failing_since if self._failing_since else 0.0
        self._give_up_after = min(self._give_up_after, failing + _GRACE)

    def failed(self, error: Exception) -> None:
        """Records a failure; raises it if it is not of storage, or has lasted too long."""
        self._done.set()
        waited = isinstance(error, TimeoutError)  # for a thread of orbax, which retries
        if not (waited or faults.local_reason(error) or faults.is_failure(error)):
            raise error
        reason = faults.local_reason(error) or faults.reason(error) or "another host's failure"
        now = time.monotonic()
        first = self._failing_since is None
        self._failing_since = self._failing_since or now
        self._failures += 1
        self._wait = min(max(2 * self._wait, 1.0), _LONGEST_WAIT)
        self._retry_at = now + self._wait
        faults.record(f"{reason} while saving", self._directory, faults.first_line(error))
        if now - self._failing_since > self._give_up_after:
            kind = StorageRefused if faults.denied(error) else StorageError
            raise kind(self._sentence(error)) from error
        if first:
            self._report(
                self._step,
                f"A checkpoint could not be written to {self._directory}: {faults.explain(error)} "
                "Training goes on, and saves are tried again. The run ends if none succeeds within "
                f"{formatting.format_seconds(self._give_up_after)}.",
            )

    def _sentence(self, error: BaseException) -> str:
        return (
            f"A checkpoint could not be written to {self._directory}: {faults.explain(error)} The "
            "same command resumes at the last complete one."
        )

    def succeeded(self) -> None:
        """Records that the save is written, unless it failed and was not begun again."""
        if self._retry_at is not None:
            return
        if self._failing_since is not None:
            seconds = formatting.format_seconds(time.monotonic() - self._failing_since)
            self._report(
                self._step,
                f"Checkpoints are written to {self._directory} again, after {seconds} and "
                f"{self._failures} failures.",
            )
        self._failing_since, self._failures, self._wait = None, 0, 0.0

    @property
    def lost(self) -> bool:
        """The last save failed and was not begun again."""
        return self._retry_at is not None

    @property
    def failing(self) -> bool:
        """A save has failed, and none has succeeded since."""
        return self._failing_since is not None

    def retry_due(self) -> bool:
        """Returns whether a save failed, long enough ago to try again."""
        return self._retry_at is not None and time.monotonic() >= self._retry_at

    def pause(self) -> None:
        """Sleeps until the next try, where training does not go on meanwhile."""
        if self._retry_at is not None:
            time.sleep(min(max(0.0, self._retry_at - time.monotonic()), _LONGEST_PAUSE))

    def close(self) -> None:
        """Ends the watch."""
        self._done.set()


def remove_unfinished(directory: epath.Path) -> None:
    """Deletes the folders of saves that failed, or whose process was killed; logs a failure.

    Raises:
      StorageError: a bucket does not tell which ones they are.
    """
    if not directory.exists():
        return
    unfinished = [path for path in directory.iterdir() if _is_unfinished(path)]
    try:
        for path in unfinished:
            path.rmtree()
    except Exception as error:  # a later save needs it more, and will tell
        logging.warning(
            "Half-written checkpoints in %s were not removed: %s", directory, faults.explain(error)
        )


def _is_unfinished(path: epath.Path) -> bool:
    if not remote.is_remote(path):
        return atomicity_types.TMP_DIR_SUFFIX in path.name
    if not path.name.isdecimal():
        return False
    try:  # not by exists(), which takes a failure of the bucket for "no"
        ranges.read(path / atomicity.COMMIT_SUCCESS_FILE)  # which orbax writes last
    except FileNotFoundError:
        return True
    return False
