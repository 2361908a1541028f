"""Failures of a bucket: retries, counts, and explanations for the user.

A burst of 503, a throttled request, a connection that breaks or stalls: all of these are usual, and
are retried with exponential back-off and jitter. Each such failure is counted by its reason and
logged now and then. A permanent failure, such as a missing bucket, becomes one sentence.
"""

import errno
import functools
import logging
import os
import random
import re
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from etils import epath

from clip_jax.errors import StorageError, StorageRefused, UserError
from clip_jax.storage import remote

# Seconds for which a failing request is retried before its error is final. An environment variable,
# not a config field: it holds for every command and for the processes that they start.
RETRY_FOR = float(os.environ.get("CLIP_JAX_STORAGE_RETRY_FOR", "600"))

_FIRST_WAIT, _LONGEST_WAIT = 0.2, 30.0  # seconds
_LONGEST_GCSFS_WAIT = 32.0  # seconds; a constant of gcsfs
_LOG_EVERY = 30.0  # seconds between two log lines of the same reason

_CODE = re.compile(r"http_response_code='(\d+)'|\((\d{3})\)|status[ =:]+'?(\d{3})|code: (\d{3})")
_BY_TENSORSTORE = re.compile(r"http_response_code=|CURL error")
_DENIED = ("401", "403")
_TRANSIENT_CODES = ("408", "429", "500", "502", "503", "504")

_counts: Counter[str] = Counter()
_logged: dict[str, tuple[float, int]] = {}  # by reason: time of the last log line, and the count
# Buckets that have been read (False) or written (True): access that they deny now may come back.
_accessed: set[tuple[str, bool]] = set()
_lock = threading.Lock()

Result = TypeVar("Result")


def counts() -> Counter[str]:
    """Returns the failures of this process so far, by reason; transient ones included."""
    with _lock:
        return Counter(_counts)


def record(reason: str, path: epath.PathLike, detail: str = "") -> None:
    """Counts a failure, and logs it unless one of the same reason was logged just before."""
    with _lock:
        _counts[reason] += 1
        now, total = time.monotonic(), _counts[reason]
        last, before = _logged.get(reason, (-_LOG_EVERY, 0))
        if now - last < _LOG_EVERY:
            return
        _logged[reason] = now, total
    more = f", {total - before:,} times since the last such line" if total - before > 1 else ""
    logging.warning(
        "Storage: %s at %s%s; trying again%s", reason, path, more, f" ({detail})" if detail else ""
    )


def record_access(path: epath.PathLike, writing: bool = False) -> None:
    """Records that the bucket of a path could be read, or written."""
    _accessed.add((remote.split(path)[1], writing))


def reason(error: BaseException) -> str:
    """Returns a short name of a failure, the same for every client; "": not one of storage."""
    code = _status(error)
    if code:
        return f"HTTP {code}"
    text, names = str(error), {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, FileNotFoundError):
        return "HTTP 404"
    if isinstance(error, PermissionError) or "Forbidden" in text:
        return "HTTP 403"
    if isinstance(error, TimeoutError) or "Timeout" in "".join(names) or "timed out" in text:
        return "no answer"
    if names & {"DefaultCredentialsError", "RefreshError", "NoCredentialsError"}:
        return "no credentials"
    if "CURL error" in text or names & {"ClientError", "ClientConnectionError", "ConnectionError"}:
        return "connection broken"
    if names & {"ChecksumError", "IncompleteRead", "ResponseParserError", "ClientPayloadError"}:
        return "body cut short"
    return ""


def _status(error: BaseException) -> str:
    """Returns the HTTP status of an error; "": it has none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return str(found) if found else ""
    code: Any = getattr(error, "code", None) or getattr(error, "status", None)
    if isinstance(code, int | str) and re.fullmatch(r"[1-5]\d\d", str(code)):
        return str(code)
    match = _CODE.search(str(error)) if isinstance(error, OSError | ValueError) else None
    return next(filter(None, match.groups()), "") if match else ""


_OS_ERROR = re.compile(r"os_error_code='(\d+)'")  # in messages of TensorStore


def local_reason(error: BaseException) -> str:
    """Returns a short name of a failure of the local file system; "": not one."""
    code = error.errno if isinstance(error, OSError) else None
    if isinstance(error, ValueError) and (found := _OS_ERROR.search(str(error))):
        code = int(found[1])
    return "" if code is None else os.strerror(code)


_DENIED_HERE = (errno.EACCES, errno.EPERM, errno.EROFS)
_LACKING_HERE = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_UNREACHABLE = (errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH)


def denied(error: BaseException) -> bool:
    """Returns whether a right is missing, or credentials."""
    names = ["HTTP 401", "HTTP 403", "no credentials", *map(os.strerror, _DENIED_HERE)]
    return (local_reason(error) or reason(error)) in names


def of_the_file(error: BaseException, path: epath.PathLike) -> bool:
    """Returns whether an error of reading is of the file: it is missing, cut short or nonsense.

    Otherwise the storage fails, or this machine, and the file may be whole.
    """
    elsewhere = map(os.strerror, (*_LACKING_HERE, *_UNREACHABLE))
    return not (
        isinstance(error, StorageError)
        or denied(error)
        or local_reason(error) in elsewhere
        or is_transient(error, path)
    )


def is_transient(error: BaseException, path: epath.PathLike, writing: bool = False) -> bool:
    """Returns whether a failure to read, or to write, may pass."""
    name = reason(error)
    if name in ("no answer", "connection broken", "body cut short"):
        return True
    code = name.removeprefix("HTTP ")
    # Access that was granted before comes back when expired credentials are renewed.
    expired = code in _DENIED and (remote.split(path)[1], writing) in _accessed
    return code in _TRANSIENT_CODES or expired


class Backoff:
    """Exponential back-off between the attempts at one request, with a deadline of `RETRY_FOR`."""

    def __init__(self, path: epath.PathLike, writing: bool = False):
        self._path, self._writing = path, writing
        self._wait = _FIRST_WAIT
        self._began = time.monotonic()

    def wait(self, error: BaseException) -> None:
        """Sleeps before the next attempt.

        Args:
          error: the error of the last attempt.

        Raises:
          StorageError: the failure is permanent, or the deadline has passed.
          Exception: `error`, where it is not one of storage.
        """
        if isinstance(error, UserError):  # the attempt has retried by itself
            raise error
        if not is_transient(error, self._path, self._writing):
            if isinstance(error, FileNotFoundError) or not reason(error):
                raise error
            raise StorageRefused(explain(error, self._path)) from error
        record(reason(error), self._path)
        if time.monotonic() - self._began + self._wait > RETRY_FOR:
            raise StorageError(
                f"{self._path} could not be reached for {RETRY_FOR:,.0f} s: {explain(error)} The "
                "same command can be run again; a training run resumes at its last checkpoint."
            ) from error
        time.sleep(self._wait * random.uniform(0.5, 1.0))
        self._wait = min(self._wait * 2, _LONGEST_WAIT)


def repeat(attempt: Callable[[], Result], path: epath.PathLike, writing: bool = False) -> Result:
    """Returns the result of `attempt`, which is retried after transient failures.

    Args:
      attempt: reads or writes `path`.
      path: local or remote; a local one is tried once.
      writing: whether `attempt` writes.

    Raises:
      StorageError: it failed for `RETRY_FOR` seconds.
      Exception: any other error of `attempt`, at once.
    """
    if not remote.is_remote(path):
        return attempt()
    backoff = Backoff(path, writing)
    while True:
        try:
            result = attempt()
        except Exception as error:
            backoff.wait(error)
        else:
            record_access(path, writing)
            return result


# Seconds before each retry of a local read, or of an object that is not there: such failures are
# rarely transient, and the caller can do without the result.
BRIEF = (0.1, 0.5, 2.0)


def briefly(attempt: Callable[[], Result], delays: Sequence[float] | None = None) -> Result:
    """Returns the result of `attempt`, retried after each of `delays` (seconds) on an OSError.

    A StorageError is final, since it was retried for longer before.
    """
    for delay in BRIEF if delays is None else delays:
        try:
            return attempt()
        except OSError:
            time.sleep(delay)
    return attempt()


_MEANINGS = {
    "HTTP 401": "the credentials are refused, or have expired",
    "HTTP 403": "the credentials lack the right to do this",
    "HTTP 404": "there is no such bucket or object",
    "HTTP 429": "the bucket throttles its requests",
    "HTTP 503": "the storage service says that it is unavailable",
    "no answer": "requests are not answered",
    "no credentials": "no credentials were found",
    "connection broken": "connections break",
    "body cut short": "answers are cut short",
}
_REMEDIES = {
    "HTTP 401": "Log in again",
    "HTTP 403": "Grant them, or use another account",
    "HTTP 404": "Check the name",
    "no credentials": "Log in",
}
_LOCAL_REMEDIES = {
    os.strerror(errno.ENOSPC): " Free space on that disk.",
    os.strerror(errno.EDQUOT): " Free space within your quota, or have it raised.",
    os.strerror(errno.EACCES): " Grant the right to write there.",
    os.strerror(errno.EPERM): " Grant the right to write there.",
    os.strerror(errno.EROFS): " Mount it for writing.",
}
_LOGIN = {
    "gs": " (gcloud auth application-default login, or the service account of the machine; reading"
    " needs the role Storage Object Viewer, writing Storage Object User).",
    "s3": " (aws configure, or the role of the machine; reading needs s3:ListBucket and"
    " s3:GetObject, writing s3:PutObject and s3:DeleteObject too).",
}


def explain(error: BaseException, path: epath.PathLike = "") -> str:
    """Returns the meaning of a failure, and its remedy, in one or two sentences."""
    if isinstance(error, StorageError):
        return str(error)
    where = f"{path}: " if path else ""
    if local := local_reason(error):
        return f"{where}{local}.{_LOCAL_REMEDIES.get(local, '')}"
    name = reason(error)
    scheme, bucket, _ = remote.split(path) if remote.is_remote(path) else ("", "", "")
    what = _MEANINGS.get(name, f"{type(error).__name__}: {first_line(error)}")
    if name == "HTTP 404" and bucket:
        return f"{where}{what}. Check the name of the bucket, {bucket!r}, and the path in it."
    remedy = _REMEDIES.get(name, "")
    if remedy:
        remedy = f" {remedy}{_LOGIN.get(scheme, '.')}" if name != "HTTP 404" else f" {remedy}."
    code = f" ({name})" if name.startswith("HTTP") else ""
    return f"{where}{what}{code}.{remedy}"


# The modules from which errors of a bucket come.
_CLIENTS = ("gcsfs", "s3fs", "google", "botocore", "aiobotocore", "aiohttp", "clip_jax.storage")


def is_failure(error: BaseException) -> bool:
    """Returns whether an error comes from a bucket, not from our code or the local disk."""
    if isinstance(error, StorageError):
        return True
    if isinstance(error, ValueError) and _BY_TENSORSTORE.search(str(error)):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return False
    raised_in = [
        frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    return bool(reason(error)) and any(name.startswith(_CLIENTS) for name in raised_in)


def explained(error: BaseException) -> str:
    """Returns the explanation of an error of a bucket; "" for others, whose traceback is needed."""
    if isinstance(error, StorageError):
        return str(error)
    found = re.search(r"(?:gs|s3)://[^\s'\"]+|/b/[^\s'\"]+", str(error))
    where = f" ({found[0]})" if found else ""
    return f"The storage failed{where}: {explain(error)}" if is_failure(error) else ""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message; one that is cut ends with "…"."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 200 else line[:199] + "…"


@functools.cache
def patch_gcsfs() -> None:
    """Makes gcsfs retry its requests for `RETRY_FOR` seconds too, and record each failure.

    By itself it gives up after half a minute. Orbax writes its metadata through it.
    """
    from gcsfs import core, retry

    repeated: Any = retry.retry_request  # made by a decorator that hides its signature
    once = core.GCSFileSystem._request.__wrapped__
    core.GCSFileSystem._request = repeated(retries=attempts_in(_LONGEST_GCSFS_WAIT))(once)
    is_retriable = retry.is_retriable

    def recorded(exception: BaseException) -> bool:
        if found := is_retriable(exception):
            record(reason(exception) or type(exception).__name__, "gs://")
        return found

    retry.is_retriable = recorded


def attempts_in(longest_wait: float) -> int:
    """Returns the number of attempts in `RETRY_FOR`, with waits of 1 s, 2 s, ... `longest_wait`."""
    return 6 + int(RETRY_FOR / longest_wait)
