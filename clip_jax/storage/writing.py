"""Atomic writes of files and folders, and files that grow; several hosts may write at once."""

import contextlib
import logging
import os
import pathlib
import queue
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator

from etils import epath

from clip_jax.storage import faults, remote

TEMPORARY = ".tmp"  # ending of incomplete files, which a killed process leaves


@contextlib.contextmanager
def replacing(path: epath.Path) -> Iterator[pathlib.Path]:
    """Yields a local path to write a file to, which is moved to `path` unless there is an error.

    A file for a bucket is written to a temporary file first and then uploaded: an upload that is
    interrupted leaves nothing, while an interrupted file object of a bucket leaves a part.
    """
    if remote.is_remote(path):
        with tempfile.TemporaryDirectory(prefix="clip_jax-") as folder:
            temporary = pathlib.Path(folder) / path.name
            yield temporary
            upload(temporary, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(path.parent) / f"{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: epath.Path) -> Iterator[pathlib.Path]:
    """Yields a local path to make a folder, or a file, at; it is moved to `path` at the end."""
    far = remote.is_remote(path)
    parent = None if far else path.parent
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=parent) as scratch:
        temporary = pathlib.Path(scratch) / path.name
        yield temporary
        if not far:
            os.replace(temporary, path)
        elif temporary.is_dir():
            _upload_folder(temporary, path)
        else:
            upload(temporary, path)


def _upload_folder(folder: pathlib.Path, path: epath.Path) -> None:
    """Copies a folder to a bucket, its .json files last; deletes the copies on an error."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    done: list[epath.Path] = []
    try:
        for file in sorted(files, key=lambda file: (file.suffix == ".json", file)):
            done.append(path / file.relative_to(folder).as_posix())
            upload(file, done[-1])
    except BaseException:
        for each in done:
            with contextlib.suppress(Exception):
                each.unlink(missing_ok=True)
        raise


def write(path: epath.Path, contents: bytes | str) -> None:
    """Writes a small file atomically."""
    data = contents.encode() if isinstance(contents, str) else contents
    if remote.is_remote(path):
        client = remote.filesystem(path)
        faults.repeat(lambda: client.pipe_file(os.fspath(path), data), path, writing=True)
        return
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def upload(file: pathlib.Path, path: epath.Path) -> None:
    """Copies a local file to a bucket."""
    client = remote.filesystem(path)
    faults.repeat(lambda: client.put_file(os.fspath(file), os.fspath(path)), path, writing=True)


def remove(path: epath.Path) -> None:
    """Deletes a file, if it is there."""
    faults.repeat(lambda: path.unlink(missing_ok=True), path, writing=True)


def move_folder(source: epath.Path, target: epath.Path) -> None:
    """Moves a folder within a disk or a bucket; the target must not exist."""
    if not remote.is_remote(source):
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(source, target)
        return
    client = remote.filesystem(source)
    old, new = os.fspath(source), os.fspath(target)
    faults.repeat(lambda: client.mv(old, new, recursive=True), source, writing=True)


# ---- Files that grow -----------------------------------------------------------------------------

_UPLOAD_EVERY = 60.0  # seconds
_FLUSH_WITHIN = 10.0  # seconds that a flush waits for the upload


class Growing:
    """A directory whose files grow, such as logs.

    Objects of a bucket cannot be appended to. So the files are kept in a local directory, and those
    that have changed are uploaded once a minute and at every `flush`.

    Attributes:
      local: the local directory to write to.
    """

    def __init__(self, directory: epath.Path):
        """Uploads nothing yet.

        Args:
          directory: final directory of the files; local, gs:// or s3://.
        """
        self._directory = directory
        self._remote = remote.is_remote(directory)
        self._uploaded: dict[pathlib.Path, int] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._flushes: queue.SimpleQueue[threading.Event] = queue.SimpleQueue()
        if not self._remote:
            directory.mkdir(parents=True, exist_ok=True)
            self.local = pathlib.Path(directory)
            return
        self.local = pathlib.Path(tempfile.mkdtemp(prefix="clip_jax-"))
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
        self._thread.start()

    def flush(self) -> None:
        """Uploads all that has changed; goes on without, where that fails or takes long.

        A later upload may succeed; `close` raises.
        """
        if self._remote:
            done = threading.Event()
            self._flushes.put(done)
            done.wait(_FLUSH_WITHIN)

    def _try(self) -> None:
        began = time.monotonic()
        try:
            self._upload()
        except Exception as error:
            logging.warning(
                "The logs of %s are not there yet, after %.0f s: %s",
                self._directory,
                time.monotonic() - began,
                faults.explain(error),
            )

    def _upload(self) -> None:
        with self._lock:
            for file in sorted(p for p in self.local.rglob("*") if p.is_file()):
                size = file.stat().st_size
                if self._uploaded.get(file) != size:
                    upload(file, self._directory / file.relative_to(self.local).as_posix())
                    self._uploaded[file] = size

    def close(self) -> None:
        """Uploads all that has changed, and removes the temporary directory."""
        self._closed.set()
        self._flushes.put(threading.Event())  # ends the thread
        if self._remote and self.local.exists():
            self._upload()
            shutil.rmtree(self.local, ignore_errors=True)

    def _work(self) -> None:
        while True:
            done = threading.Event()
            with contextlib.suppress(queue.Empty):
                done = self._flushes.get(timeout=_UPLOAD_EVERY)
            if self._closed.is_set():
                return
            self._try()
            done.set()
