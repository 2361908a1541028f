"""Hosts that join, and end together when one of them ends before its time."""

import os
import signal
import socket
import sys
import time

import pytest
from several_hosts import endings, flags, free_port, launch

from clip_jax.common import commands, hosts
from clip_jax.errors import ExitCode, UserError

COUNT = 3
WITHIN = 60  # seconds


def work(how: str, coordinator: str, processes: str, process: str) -> None:
    """A host that ends in the way of "killed 1" if its number is 1, and otherwise waits."""
    wanted, _, number = how.partition(" ")
    with commands.plain_errors():
        hosts.join(coordinator, int(processes), int(process))
        if number == process:
            if wanted == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if wanted == "mistaken":
                raise UserError("The file of this host is missing.")
            if wanted == "faulty":
                raise KeyError("fault")
            if wanted == "left":
                sys.exit(7)
        if number:
            time.sleep(2 * WITHIN)
        print("Done")


def start(how: str):
    values = [[flag.partition("=")[2] for flag in each] for each in flags(COUNT)]
    began = time.monotonic()
    ended = endings([launch([__file__, how, *each], devices=1) for each in values])
    assert time.monotonic() - began < WITHIN
    return ended


def test_all_end_well():
    for ended in start("well"):
        assert (ended.returncode, ended.stdout) == (ExitCode.DONE, "Done\n")


@pytest.mark.parametrize("process", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_host_ends_the_others_with_a_sentence(process):
    ended = start(f"killed {process}")
    assert ended.pop(process).returncode == -signal.SIGKILL
    for other in ended:
        assert other.returncode == ExitCode.RESUME
        said = f"Host {process} is gone: start the same command again on every host to resume."
        assert said in other.stderr  # JAX may log a line before it, or behind
        assert "Check failure" not in other.stderr
        assert "Traceback" not in other.stderr
        assert "Fatal" not in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("mistaken", ExitCode.USER_ERROR, "The file of this host is missing."),
        ("faulty", ExitCode.FAULT, "KeyError: 'fault'"),
        ("left", 7, "it ended with exit status 7."),
    ],
)
def test_a_host_that_fails_tells_the_others_why(process, how, code, said):
    ended = start(f"{how} {process}")
    failed = ended.pop(process)
    assert failed.returncode == code
    assert said in failed.stderr or how == "left"
    for other in ended:
        assert other.returncode == code
        wanted = f"Host {process} has ended, so this one ends too. It says: {said}"
        assert other.stderr.strip().endswith(wanted)


@pytest.mark.parametrize(
    ("coordinator", "processes", "process", "message"),
    [
        ("10.0.0.1", 2, 1, r"10\.0\.0\.1 is no HOST:PORT"),
        ("10.0.0.1:", 2, 1, "is no HOST:PORT"),
        ("10.0.0.1:http", 2, 1, "is no HOST:PORT"),
        ("10.0.0.1:99999", 2, 1, "is no HOST:PORT"),
        (":1234", 2, 1, "is no HOST:PORT"),
        ("no-such-host.invalid:1234", 2, 1, "is not known here"),
        ("127.0.0.1:1234", 2, None, "needs --processes.*and --process"),
        ("127.0.0.1:1234", None, 1, "needs --processes.*and --process"),
        ("127.0.0.1:1234", 2, 2, "--process=2 is none of --processes=2"),
        ("127.0.0.1:1234", 2, -1, "--process=-1 is none of --processes=2"),
        ("127.0.0.1:1234", 0, 0, "--processes=0"),
        ("auto", 2, None, "leave out --processes and --process"),
    ],
)
def test_wrong_flags(coordinator, processes, process, message):
    with pytest.raises(UserError, match=message):
        hosts.join(coordinator, processes, process)


@pytest.mark.parametrize("slurm", [{}, {"SLURM_JOB_ID": "1"}], ids=["nowhere", "without srun"])
def test_auto_without_a_cluster(slurm, monkeypatch):
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    program = "from clip_jax.common import commands, hosts\n"
    program += "with commands.plain_errors(): hosts.join('auto', None, None)"
    (ended,) = endings([launch(["-c", program], devices=1)])
    assert ended.returncode == ExitCode.USER_ERROR
    assert ended.stderr.startswith("\n--coordinator=auto finds no cluster")
    assert "within srun" in ended.stderr


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", free_port())) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"Port {port} .* cannot be used"):
            hosts.join(f"127.0.0.1:{port}", 2, 0)


JOIN = """
from clip_jax.common import commands, hosts
hosts._JOIN_TIMEOUT = {seconds}
with commands.plain_errors():
    hosts.join("127.0.0.1:{port}", {processes}, {process})
"""


def join(*given: tuple[int, int], seconds: int = 20):
    """Lets hosts join that were given these --processes and --process."""
    port = free_port()
    programs = [
        JOIN.format(port=port, processes=processes, process=process, seconds=seconds)
        for processes, process in given
    ]
    return endings([launch(["-c", program], devices=1) for program in programs])


@pytest.mark.parametrize("process", [0, 1])
def test_hosts_that_do_not_come(process):
    """They may be on their way: launchers start the others again."""
    (ended,) = join((2, process), seconds=3)
    assert ended.returncode == ExitCode.RESUME
    assert f"did not find each other within 3 s: host {process} of 2" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_host_that_counts_more_hosts_than_the_first():
    for ended in join((2, 0), (3, 1)):
        assert ended.returncode == ExitCode.USER_ERROR
        said = "Host 1 was started with --processes=3, host 0 with --processes=2: give every host"
        assert ended.stderr.count(said) == 1
        assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_a_number_that_the_first_host_does_not_know():
    first, other, wrong = join((2, 0), (3, 1), (3, 2), seconds=10)
    assert "refuses host 2 of 3" in wrong.stderr or wrong.returncode == ExitCode.RESUME
    assert "Traceback" not in wrong.stderr
    assert first.returncode == other.returncode == ExitCode.USER_ERROR


@pytest.mark.slow
def test_two_hosts_of_one_number():
    first, *others = join((3, 0), (3, 1), (3, 1), seconds=8)
    assert first.returncode == ExitCode.RESUME, first.stderr
    wrong = [each for each in others if each.returncode == ExitCode.USER_ERROR]
    assert len(wrong) == 1
    assert "refuses host 1 of 3: another one was started with --process=1" in wrong[0].stderr


def test_the_first_host_of_a_cluster_is_waited_for(monkeypatch):
    """There it gets its name only once it has been placed, maybe after the others."""
    asked = []

    def lookup(*address):
        asked.append(address)
        if len(asked) < 3:
            raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(hosts.socket, "getaddrinfo", lookup)
    monkeypatch.setattr(hosts.time, "sleep", lambda _: None)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    hosts._check_address("clip-slice-0-0.clip:8476", 1)
    assert len(asked) == 3
    asked.clear()
    monkeypatch.setattr(hosts, "_JOIN_TIMEOUT", 0)
    with pytest.raises(UserError, match=r"clip-slice-0-0\.clip:8476 is not known here") as raised:
        hosts._check_address("clip-slice-0-0.clip:8476", 1)
    assert raised.value.exit_code == ExitCode.RESUME
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    with pytest.raises(UserError, match="is not known here") as raised:
        hosts._check_address("clip-slice-0-0.clip:8476", 1)
    assert raised.value.exit_code == ExitCode.USER_ERROR


if __name__ == "__main__":
    work(*sys.argv[1:])
