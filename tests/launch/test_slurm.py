"""launch/slurm.sh without SLURM: its commands, its answers to mistakes, and the job's restarts.

tests/launch/golden/slurm/ is kept as tests/launch/golden/ is. A real SLURM: test_slurm_cluster.py.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import fake_cloud
import pytest
from fake_cloud import ROOT

from clip_jax.errors import ExitCode

GOLDEN = sorted((ROOT / "tests/launch/golden/slurm").glob("*.txt"))
MAIN = "-- --config=configs/vit_b32.py --workdir=/shared/runs/b32"
SETTINGS = """SBATCH_NAME=b32
SBATCH_PARTITION=gpu
SBATCH_NODES=2
SBATCH_GPUS_PER_NODE=8
SBATCH_TIME=1-00:00:00
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("slurm") / "clip_jax"
    fake_cloud.make_repository(folder)
    (folder / "cluster.env").write_text(SETTINGS)
    return folder


def launch(repository, arguments, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SBATCH_", "SLURM_"))}
    return subprocess.run(
        ["launch/slurm.sh", *shlex.split(arguments)],
        cwd=repository,
        env=clean | {"USER": "me", "SBATCH_POLL": "0.1"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.stem)
def test_dry_run(golden, repository):
    command = golden.read_text().splitlines()[0]
    answer = launch(repository, command.removeprefix("$ launch/slurm.sh "))
    assert answer.returncode == 0, answer.stderr
    got = f"{command}\n{answer.stdout}"
    if os.environ.get("CLIP_JAX_UPDATE_GOLDEN"):
        golden.write_text(got)
    assert got == golden.read_text()
    assert subprocess.run(["bash", "-n"], input=answer.stdout, text=True).returncode == 0


def test_help(repository):
    answer = launch(repository, "--help")
    assert answer.returncode == 0
    commands = re.findall(r"^  ([a-z]+)  ", answer.stdout, re.MULTILINE)
    assert set(commands) == {path.read_text().split()[2] for path in GOLDEN}
    for command in commands:
        more = launch(repository, f"{command} --help")
        assert more.returncode == 0
        assert more.stdout.startswith(f"launch/slurm.sh {command} ")


# Arguments, and what the answer must name.
MISTAKES = {
    "no command": ("", r"run, start.*--help"),
    "unknown command": ("submit", r"'submit'.*run, start"),
    "unknown option": (f"run --zone=a {MAIN}", r"--zone.*launch/slurm\.sh run --help"),
    "bad name": (f"run --name='my run' {MAIN}", r"'my run'.*--name="),
    "bad nodes": (f"run --nodes=two {MAIN}", r"--nodes.*'two'"),
    "no nodes": (f"run --nodes=0 {MAIN}", r"--nodes=0"),
    "uneven": (f"run --gpus-per-node=h100:8 --tasks-per-node=3 {MAIN}", r"8 GPUs.*=3"),
    "own signal": (f"run --sbatch-flag=--signal=USR1@9 {MAIN}", r"--signal=USR1@9.*--grace"),
    "no flag": (f"run --sbatch-flag=exclusive {MAIN}", r"'exclusive'.*--sbatch-flag=-"),
    "no env file": (f"run --env=none.env {MAIN}", r"none\.env.*SBATCH_NODES"),
    "no config": ("run -- --workdir=/shared/run", r"--config=configs/vit_b32"),
    "no such config": (
        "run -- --config=configs/vit_b33.py --workdir=/shared/run",
        r"vit_b33.*quickstart.py vit_b32.py",
    ),
    "no workdir": ("run -- --config=vit_b32", r"--workdir=/shared.*gs://"),
    "unshared workdir": (
        "run --nodes=2 -- --config=vit_b32 --workdir=/tmp/run",
        r"/tmp/run.*--workdir=/shared",
    ),
    "fixed coordinator": (f"run {MAIN} --coordinator=n1:1234", r"n1:1234.*leave"),
    "no sbatch": (f"run {MAIN}", r"no sbatch.*login node.*--dry-run"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_paragraph(name, repository, tmp_path):
    for tool in ("bash", "dirname", "cat", "sed", "tr", "id"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    if name != "no sbatch":
        fake_cloud.executable(tmp_path / "sbatch", "#!/bin/sh\necho called >&2\nexit 1\n")
    arguments, wanted = MISTAKES[name]
    python = f"--python={sys.executable} "
    if arguments.startswith("run"):
        arguments = "run " + python + arguments.removeprefix("run")
    answer = launch(repository, arguments, PATH=str(tmp_path))
    assert answer.returncode == ExitCode.USER_ERROR
    said = fake_cloud.one_paragraph(answer.stderr)
    assert re.search(wanted, said), said


# srun takes the next exit code, "+" before it adds a checkpoint; the controller answers from files.
FAKE_SRUN = """#!/bin/bash
printf '%s\\n' "$*" >>srun.calls
code=$(head -n 1 codes) && sed -i 1d codes
case "$code" in +*) step=$(cat steps 2>/dev/null || echo 0) && step=$((step + 9))
  echo "$step" >steps && mkdir -p "work/checkpoints/$step" ;; esac
case "$code" in *c*) echo COMPLETING >state ;; esac
code=${code#+} && exit "${code%c}"
"""
FAKE_SQUEUE = '#!/bin/sh\ncase "$*" in *%T) cat state ;; *) cat left ;; esac\n'


class Job:
    """The job's batch script, run with given exit codes of srun."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        fake_cloud.executable(folder / "bin/srun", FAKE_SRUN)
        fake_cloud.executable(folder / "bin/squeue", FAKE_SQUEUE)
        fake_cloud.executable(folder / "bin/scontrol", '#!/bin/sh\necho "$*" >>scontrol.calls\n')
        for name in ("launch", "clip_jax", "main.py"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "runs/slurm").mkdir(parents=True)
        (folder / "state").write_text("RUNNING\n")

    def __call__(self, codes: str, left: str = "UNLIMITED", restarted: int = 0):
        (self.folder / "codes").write_text("\n".join(codes.split()) + "\n")
        (self.folder / "left").write_text(left + "\n")
        (self.folder / "srun.calls").write_text("")
        command = shlex.split(f"launch/slurm_job.sh job b32 {sys.executable} 1 3 60 work")
        env = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
        env |= {"RESTART_PAUSE": "0", "SLURM_RESTART_COUNT": str(restarted)}
        return subprocess.run(
            [*command, "--config=x", "--config.tag", "two words"],
            cwd=self.folder,
            env=os.environ | env | {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[str]:
        return (self.folder / "srun.calls").read_text().splitlines()

    def starts(self) -> int:
        return len(self.calls())

    def requeued(self) -> bool:
        return (self.folder / "scontrol.calls").exists()

    def end(self) -> str:
        return re.findall("END=(.*)", (self.folder / "runs/slurm/b32.state").read_text())[0]


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path)


@pytest.mark.parametrize(
    ("codes", "code", "starts"),
    [
        ("0", 0, 1),
        ("2", 2, 1),
        ("1", 1, 1),
        ("41", 41, 1),
        ("42 127 137 0", 0, 4),
        ("255 130 2", 2, 3),
        ("42 42 42 137", 137, 4),  # three restarts without progress are allowed
        ("42 42 +42 42 42 42 0", 0, 7),  # progress counts anew
        ("+42 42 42 42 42 0", 42, 5),
    ],
)
def test_restarts(job, codes, code, starts):
    ended = job(codes)
    assert (ended.returncode, job.starts()) == (code, starts), ended.stdout
    assert job.end() == ("finished" if code == 0 else f"failed\\ with\\ exit\\ status\\ {code}")
    assert not job.requeued()
    if codes.startswith("42 42 42 137"):
        assert "137 after 3 restarts in a row without a new checkpoint" in ended.stdout


def test_every_start_is_the_same(job):
    job("42 0")
    calls = job.calls()
    assert calls[0] == calls[1]
    for part in ("--ntasks=2 --ntasks-per-node=1", "--kill-on-bad-exit=0", "--label"):
        assert part in calls[0]
    assert calls[0].endswith(f"task {sys.executable} 1 --config=x --config.tag two words")


@pytest.mark.parametrize(
    ("left", "requeued"),
    [("1:00", True), ("0:00", True), ("3:01", False), ("1:00:00", False), ("2-00:00:10", False)],
)
def test_shortly_before_the_time_limit_the_job_is_requeued(job, left, requeued):
    assert job("+42 0", left=left).returncode == 0
    assert (job.requeued(), job.starts()) == (requeued, 1 if requeued else 2)
    if requeued:
        assert (job.folder / "scontrol.calls").read_text() == "requeue 7\n"
        assert job.end() == "''"


def test_failures_are_counted_across_requeues(job):
    job("42", left="1:00")
    ended = job("42 42 42 0", left="1:00:00", restarted=1)
    assert (ended.returncode, job.starts()) == (42, 3), ended.stdout
    assert job("42 42 42 0").returncode == 0  # submitted anew


def test_a_job_that_slurm_ends_does_not_start_again(job):
    ended = job("+42c 0")
    assert (ended.returncode, job.starts()) == (42, 1)
    assert job.end() == "stopped\\ by\\ SLURM"


@pytest.mark.parametrize(
    ("environment", "tasks", "ids"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4"}, 1, "0,1,2,3"),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4"}, 2, "2,3"),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 4, "1"),
        ({"CUDA_VISIBLE_DEVICES": "2", "SLURM_GPUS_ON_NODE": "4"}, 4, "0"),  # SLURM has split them
        ({"SLURM_GPUS_ON_NODE": "8"}, 2, "4,5,6,7"),
        ({"SLURM_GPUS_ON_NODE": "0"}, 2, ""),
        ({"ROCR_VISIBLE_DEVICES": "4,5"}, 1, "0,1"),
    ],
)
def test_each_task_drives_its_part_of_the_gpus(environment, tasks, ids, tmp_path):
    """JAX would let a task drive the GPU of its own number alone."""
    fake_cloud.executable(tmp_path / "python", '#!/bin/sh\necho "$JAX_LOCAL_DEVICE_IDS" "$@"\n')
    clean = {k: v for k, v in os.environ.items() if not k.endswith(("_DEVICES", "_IDS"))}
    said = subprocess.run(
        ["launch/slurm_job.sh", "task", tmp_path / "python", str(tasks), "--config=x", "a b"],
        cwd=ROOT,
        env=clean | {"SLURM_LOCALID": "1" if tasks > 1 else "0"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == f"{ids} main.py --config=x a b\n"
