"""Errors whose message is written for the user, and the exit codes of all commands."""

import enum


class ExitCode(enum.IntEnum):
    """The exit codes of all commands.

    Those of 128 and more are a signal's. XPK starts again on RESUME and from 127 on, and so does
    launch/; a user error would only come back.
    """

    DONE = 0
    FAULT = 1  # a fault of the program, with a traceback; or a check that found something
    USER_ERROR = 2  # what the user can put right: a setting, a path, the data
    # Asked to stop by SIGTERM or SIGHUP; or a host is gone, storage fails, data stall: the same
    # command goes on.
    RESUME = 42
    INTERRUPTED = 130  # Ctrl-C
    UNREAD = 141  # nobody reads the output any more, as in | head; SIGPIPE's


class UserError(ValueError):
    """Something the user can put right; main.py prints the message without a traceback."""

    exit_code = ExitCode.USER_ERROR


class DataStalled(UserError):
    """No batch came in time. Threads that hang may keep the process from ending by itself."""

    exit_code = ExitCode.RESUME


class NotJoined(UserError):
    """The hosts have not joined. JAX's threads that wait for the others may crash at exit."""

    def __init__(self, text: str, exit_code: ExitCode = ExitCode.USER_ERROR):
        super().__init__(text)
        self.exit_code = exit_code


class StorageError(UserError):
    """A failure of storage that repeating did not cure. Threads may still wait for it."""

    exit_code = ExitCode.RESUME


class StorageRefused(StorageError):
    """A failure of storage that repeating does not cure: no such bucket, or no right to it."""

    exit_code = ExitCode.USER_ERROR


class Stopped(BaseException):
    """A run has stopped since it was asked to.

    Attributes:
      exit_code: exit code of the process.
      everywhere: whether all hosts have stopped at the same step.
    """

    def __init__(self, text: str, exit_code: ExitCode, everywhere: bool = False):
        super().__init__(text)
        self.exit_code = exit_code
        self.everywhere = everywhere


class BadExample(Exception):
    """One example cannot be used; the pipeline counts it under `reason` and continues.

    Attributes:
      reason: short and fixed, the name it is counted under ("unreadable image").
      key: name of the example.
      detail: further explanation; "": none.
    """

    def __init__(self, reason: str, key: str, detail: str = ""):
        super().__init__(f"{key}: {reason}" + (f" ({detail})" if detail else ""))
        self.reason = reason
        self.key = key
        self.detail = detail

    def __reduce__(self):
        """Returns the constructor's arguments; pickle passes only the message otherwise."""
        return type(self), (self.reason, self.key, self.detail)
