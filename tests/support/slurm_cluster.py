"""A SLURM cluster of two hosts, both of which are this machine, with its own munge, in one folder.

apt-get install slurm-wlm munge
python tests/support/slurm_cluster.py       # keeps one up until Ctrl-C, to try launch/slurm.sh
"""

import contextlib
import getpass
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
FIRST = "127.0.0.2"  # name of the first host: another address of this machine, known without DNS
# Devices that SLURM takes for the GPUs of a host, which it only counts.
GPUS = ("null", "zero", "full", "random")

# A requeued job may start again once its old credentials have expired: after 2 minutes by default.
_CONFIG = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket,cred_expire=20
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1
MpiDefault=none
ReturnToService=2
KillWait=300
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=DEFAULT CPUs=4 Gres=gpu:{gpus} RealMemory=8000
NodeName={first} NodeHostname=another NodeAddr=127.0.0.1 Port={ports[1]}
NodeName={host} NodeAddr=127.0.0.1 Port={ports[2]}
PartitionName=all Nodes={first},{host} Default=YES MaxTime=INFINITE
"""


def missing() -> list[str]:
    """The programs of a cluster that are not installed."""
    return [name for name in PROGRAMS if not shutil.which(name, path=_path())]


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Cluster:
    """A cluster that is up within `with`.

    Attributes:
      env: environment for SLURM's commands.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SBATCH_", "SLURM_"))}
        self.env |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "Cluster":
        folder, host = self.folder, socket.gethostname().partition(".")[0]
        folder.chmod(0o700)  # munge asks for it
        for name in ("run", "state", "spool", "log"):
            (folder / name).mkdir(mode=0o755)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        (folder / "gres.conf").write_text(
            "".join(f"Name=gpu File=/dev/{device}\n" for device in GPUS)
        )
        facts = {"folder": folder, "host": host, "ports": _free_ports(3)}
        facts |= {"user": getpass.getuser(), "gpus": len(GPUS), "first": FIRST}
        (folder / "slurm.conf").write_text(_CONFIG.format_map(facts))
        try:
            self._start(
                *f"munged --foreground --force --socket={folder}/run/munge.socket".split(),
                f"--key-file={key}",
                f"--seed-file={folder}/munge.seed",
                f"--pid-file={folder}/run/munged.pid",
                f"--log-file={folder}/log/munged.log",
            )
            _wait(lambda: (folder / "run/munge.socket").exists())
            self._start("slurmctld", "-D", "-f", folder / "slurm.conf")
            for name in (FIRST, host):
                self._start("slurmd", "-D", "-f", folder / "slurm.conf", "-N", name)
            ready = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
            _wait(lambda: self.call(*ready, check=False).strip() == "2")
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, *command) -> None:
        with open(self.folder / "log" / f"{command[0]}.out", "a") as log:
            self._daemons.append(
                subprocess.Popen(
                    [str(word) for word in command],
                    env=self.env,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def __exit__(self, *_) -> None:
        self.call("scancel", "--signal=KILL", "--full", f"--user={getpass.getuser()}", check=False)
        self.call("scancel", f"--user={getpass.getuser()}", check=False)
        end = time.monotonic() + 30
        while self.call("squeue", "--noheader", check=False).strip() and time.monotonic() < end:
            time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def call(self, *command: str, check: bool = True) -> str:
        """Returns what one of SLURM's commands prints."""
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout


def _free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _wait(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the cluster did not come up: see its folder log/"
        time.sleep(0.2)


def main() -> None:
    if lacking := missing():
        sys.exit(f"Not installed: {', '.join(lacking)}. Try 'apt-get install slurm-wlm munge'.")
    with tempfile.TemporaryDirectory() as folder, Cluster(pathlib.Path(folder)):
        print(f"export SLURM_CONF={folder}/slurm.conf", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
