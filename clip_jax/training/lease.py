"""The lease of a workdir: one run at a time, and none that a dead run holds for ever.

The file names its holder and a beat, which the holder renews. A holder on this machine is asked for
by its process. One elsewhere is watched for `EXPIRES` seconds: if the beat stays the same in this
time, it is dead. So no clocks of two machines are compared.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import datetime

from etils import epath

from clip_jax.errors import StorageError, UserError
from clip_jax.storage import locations, ranges, remote, writing

FILE = "lease.json"  # inside the workdir

_BEAT = 15.0  # seconds between two renewals
EXPIRES = 60.0  # seconds without a renewal after which a holder is dead


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that holds a workdir.

    Attributes:
      id: random, unique for every holder.
      host: name of its host.
      pid: its process.
      machine: boot and process namespace, in which `pid` has a meaning; "": not known.
      started: start of the process in ticks after boot; "": not known.
      since: local time at which it took the lease.
      beat: number of renewals.
    """

    id: str
    host: str
    pid: int
    machine: str
    started: str
    since: str
    beat: int = 0


@contextlib.contextmanager
def held(workdir: epath.PathLike) -> Iterator[None]:
    """Holds a workdir while its body runs; the first host does so for all hosts of a run.

    Raises:
      UserError: another run holds it.
    """
    import jax  # late: the command `status` reads leases without it

    if jax.process_index() != 0:
        yield
        return
    path = locations.parse(workdir) / FILE
    mine = Holder(
        id=uuid.uuid4().hex,
        host=socket.gethostname(),
        pid=os.getpid(),
        machine=_machine(),
        started=_started(os.getpid()),
        since=datetime.now().isoformat(" ", "seconds"),
    )
    _take(path, mine)
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(path, mine, ended), name="lease", daemon=True)
    thread.start()
    release = True
    try:
        yield
    except StorageError:
        release = False  # to ask the same storage again would take as long again; it expires
        raise
    finally:
        ended.set()
        thread.join(_BEAT)
        if release:
            with contextlib.suppress(OSError, StorageError):
                _release(path, mine)


def _take(path: epath.Path, mine: Holder) -> None:
    """Writes the lease once nobody else holds it."""
    found = _read(path)
    if found is not None and not _is_dead(path, found):
        raise UserError(_refusal(path, found))
    if found is not None:
        writing.remove(path)
    if not _create(path, mine):
        other = _read(path)  # two runs began at the same time
        raise UserError(_refusal(path, other or mine))


def _create(path: epath.Path, mine: Holder) -> bool:
    """Writes the lease unless there is one; returns whether it is this process's."""
    if remote.is_remote(path):
        writing.write(path, _to_json(mine))
        time.sleep(1.0)  # another that saw no lease either has written by now; the last one wins
        found = _read(path)
        return found is not None and found.id == mine.id
    try:
        with open(path, "x") as file:
            file.write(_to_json(mine))
    except FileExistsError:
        return False
    return True


def read(workdir: epath.PathLike) -> Holder | None:
    """Returns the holder of a workdir, dead or alive; None: there is none."""
    return _read(locations.parse(workdir) / FILE)


def lives(found: Holder) -> bool | None:
    """Returns whether a holder on this machine lives; None: it is elsewhere."""
    if found.machine and found.machine == _machine():
        return _started(found.pid) == found.started
    return None


def _is_dead(path: epath.Path, found: Holder) -> bool:
    """Returns whether the holder has ended; takes `EXPIRES` seconds for one elsewhere."""
    if (alive := lives(found)) is not None:
        return not alive
    print(
        f"{path} names a run on {found.host}, process {found.pid}: watching for {EXPIRES:.0f} s "
        "whether it is alive.",
        flush=True,
    )
    deadline = time.monotonic() + EXPIRES
    while time.monotonic() < deadline:
        time.sleep(min(1.0, EXPIRES / 4))
        now = _read(path)
        if now is None:
            return True
        if now != found:
            return False
    return True


def _renew(path: epath.Path, mine: Holder, ended: threading.Event) -> None:
    """Renews the lease; ends the process where another run has taken it."""
    while not ended.wait(_BEAT):
        with contextlib.suppress(OSError, StorageError):  # the next beat may succeed
            found = _read(path)
            if found is not None and found.id != mine.id:
                print(f"\n{_refusal(path, found)}", file=sys.stderr, flush=True)
                os._exit(2)
            mine = dataclasses.replace(mine, beat=mine.beat + 1)
            if not ended.is_set():
                writing.write(path, _to_json(mine))


def _release(path: epath.Path, mine: Holder) -> None:
    found = _read(path)
    if found is not None and found.id == mine.id:
        writing.remove(path)


def _read(path: epath.Path) -> Holder | None:
    """Returns the holder that the file names; None: there is no file, or one that names none."""
    try:
        return Holder(**json.loads(ranges.read(path)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError):
        return Holder("", "an unknown host", 0, "", "", "an unknown time")


def _to_json(holder: Holder) -> str:
    return json.dumps(dataclasses.asdict(holder)) + "\n"


def _refusal(path: epath.Path, found: Holder) -> str:
    return (
        f"Another run writes to {path.parent}: process {found.pid} on {found.host}, since "
        f"{found.since}. Wait for it or end it, and run the same command again; or choose another "
        f"--workdir. A run that was killed gives the workdir up by itself, on another host after "
        f"{EXPIRES:.0f} s."
    )


def _machine() -> str:
    """Returns what a process number belongs to; "" where the system does not say."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Returns the start of a process in ticks after boot; "" where there is none, or a zombie."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
