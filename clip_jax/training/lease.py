"""The lease of a workdir: one run at a time, and none that a dead run holds for ever.

The file names its holder and a beat, which the holder renews. A holder on this machine is asked for
by its process. One elsewhere is watched for `EXPIRES` seconds: if the beat stays the same in this
time, it is dead. So no clocks of two machines are compared.

A process that was frozen, or whose machine was, may find on waking up that it was taken for dead.
It looks at once, and before it writes, and ends where another run has taken over.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime

from etils import epath

from clip_jax.common import lifeline
from clip_jax.errors import ExitCode, StorageError, UserError
from clip_jax.storage import locations, ranges, remote, writing

FILE = "lease.json"  # inside the workdir

_BEAT = 15.0  # seconds between two renewals
EXPIRES = 60.0  # seconds without a renewal after which a holder is dead
_CLOCKS = [time.CLOCK_MONOTONIC, time.CLOCK_REALTIME]
if hasattr(time, "CLOCK_BOOTTIME"):  # Linux
    _CLOCKS.append(time.CLOCK_BOOTTIME)


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


class Lease:
    """A lease that this process holds, or on a host other than the first, that it relies on."""

    def __init__(self, path: epath.Path, mine: Holder | None):
        self._path, self._mine = path, mine
        self._seen = _times()  # when it was last seen to be this process's

    def check(self, *, if_late: bool = False) -> None:
        """Checks that no other run has taken the workdir, before it is written to.

        Args:
          if_late: whether to look only if nobody has for as long as a lease takes to expire.

        Raises:
          UserError: another run has taken it.
        """
        if self._mine is None or (if_late and _passed(self._seen) < EXPIRES):
            return
        with contextlib.suppress(OSError, StorageError):  # the writing itself will tell
            now = _times()
            found = _read(self._path)
            if found is not None and found.id != self._mine.id:
                raise UserError(_refusal(self._path, found))
            self._seen = now

    def renew(self, ended: threading.Event) -> None:
        """Renews the lease until the run has ended; ends it where another one has taken over."""
        while self._mine is not None and not _waits(ended):
            try:
                self.check()
            except UserError as error:
                lifeline.end(str(error), ExitCode.USER_ERROR)
            self._mine = dataclasses.replace(self._mine, beat=self._mine.beat + 1)
            # Not if this process was frozen since it looked, or could not look.
            if not ended.is_set() and _passed(self._seen) < _BEAT:
                with contextlib.suppress(OSError, StorageError):  # the next beat may succeed
                    writing.write(self._path, _to_json(self._mine))


@contextlib.contextmanager
def held(workdir: epath.PathLike) -> Iterator[Lease]:
    """Holds a workdir while its body runs; the first host does so for all hosts of a run.

    Raises:
      UserError: another run holds it.
    """
    import jax  # late: the command `status` reads leases without it

    path = locations.parse(workdir) / FILE
    if jax.process_index() != 0:
        yield Lease(path, None)
        return
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
    lease = Lease(path, mine)
    thread = threading.Thread(target=lease.renew, args=(ended,), name="lease", daemon=True)
    thread.start()
    release = True
    try:
        yield lease
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
    waits = 60  # counted, since this process may be frozen meanwhile, and clocks jump
    for _ in range(waits):
        time.sleep(EXPIRES / waits)
        now = _read(path)
        if now is None:
            return True
        if now != found:
            return False
    return True


def _waits(ended: threading.Event) -> bool:
    """Waits until the next beat, and no longer where a clock has jumped; returns whether to end."""
    began = _times()
    while _passed(began) < _BEAT:
        if ended.wait(min(_BEAT, 1.0)):
            return True
    return ended.is_set()


def _times() -> list[float]:
    return [time.clock_gettime(each) for each in _CLOCKS]


def _passed(since: Sequence[float]) -> float:
    """Returns the seconds that have passed by the clock that has gone furthest.

    When a machine was suspended, some clocks have stood still.
    """
    return max(now - before for now, before in zip(_times(), since))


def _release(path: epath.Path, mine: Holder) -> None:
    found = _read(path)
    if found is not None and found.id == mine.id:
        writing.remove(path)


def _read(path: epath.Path) -> Holder | None:
    """Returns the holder that the file names; None: there is no file, or one that names none."""
    try:
        found = Holder(**json.loads(ranges.read(path)))
        if all(type(getattr(found, x.name)) is x.type for x in dataclasses.fields(found)):
            return found
        raise TypeError
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
