"""Errors whose message is written for the user: one paragraph that names the remedy."""


class UserError(ValueError):
    """Something the user can put right; main.py prints the message without a traceback."""


class DataStalled(UserError):
    """No batch came in time. Threads that hang may keep the process from ending by itself."""


class StorageError(UserError):
    """A failure of storage that repeating did not cure. Threads may still wait for it."""


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
