"""launch/slurm.sh on a real SLURM: faults, and what comes of them.

Needs slurm-wlm and munge. Each start loads JAX and trains on the embedded digits on two hosts.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import slurm_cluster
from fake_cloud import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason="needs slurm-wlm and munge"),
]
TRAIN = "--config=configs/quickstart.py:smoke --config.batch_size=8"
LONG = " --config.duration='100000 steps' --config.log.every='2 steps' "
LONG += "--config.eval.every='100000 steps' --config.checkpoint.every='1000 minutes'"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster.Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


class Run:
    """A run on two hosts, from a copy of the repository, whose log and state are its own."""

    def __init__(self, cluster, folder: pathlib.Path):
        self.cluster, self.folder = cluster, folder
        self.workdir = folder / "work"
        self.env = cluster.env | {
            "SBATCH_POLL": "0.5",
            "RESTART_PAUSE": "0",
            "SBATCH_PYTHON": sys.executable,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",  # one device for each task
        }
        for name in ("clip_jax", "configs", "main.py"):
            (folder / name).symlink_to(ROOT / name)
        shutil.copytree(ROOT / "launch", folder / "launch")  # whose place tells the repository's
        self.read = 0  # characters of the log

    def launch(self, command: str, code: int = 0) -> str:
        done = subprocess.run(
            ["launch/slurm.sh", *shlex.split(command)],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def start(self, options: str = "", arguments: str = TRAIN + LONG) -> None:
        cache = f"--config.compilation_cache={self.folder / 'cache'}"
        self.launch(f"start --nodes=2 {options} -- {arguments} --workdir=work {cache}")

    def log(self) -> str:
        path = self.folder / "runs/slurm/clip.log"
        return path.read_text() if path.exists() else ""

    def await_line(self, pattern: str, seconds: float = 900) -> re.Match:
        """Returns the next match in the log, after that of the call before."""
        end = time.monotonic() + seconds
        while True:
            log = self.log()
            if found := re.search(pattern, log[self.read :]):
                self.read += found.end()
                return found
            assert time.monotonic() < end, f"no line {pattern!r} in:\n{log[self.read :]}"
            time.sleep(0.2)

    def await_saved_and_resumed(self, what: str) -> int:
        """Waits until a request to stop was obeyed and the run trains on; returns the step."""
        step = self.await_line(rf"{what}: saved at step ([\d,]+)")[1]
        assert self.await_line(r"from step ([\d,]+)")[1] == step
        self.await_line(r"0: step \d+/")
        return int(step.replace(",", ""))

    def job(self) -> str:
        return self.cluster.call("squeue", "--noheader", "--format=%i").strip()

    def tasks(self) -> dict[str, int]:
        """The processes of main.py by the number of their task."""
        found = {}
        for path in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes().split(b"\0")
                env = (path / "environ").read_bytes().decode()
                here = (path / "cwd").resolve() == self.folder.resolve()
            except OSError:
                continue
            if here and b"main.py" in words and (number := re.search(r"SLURM_PROCID=(\d+)", env)):
                found.setdefault(number[1], int(path.name))
        return found

    def starts(self) -> list[dict]:
        paths = sorted((self.workdir / "starts").iterdir())
        return [json.loads(path.read_text()) for path in paths]


@pytest.fixture
def run(cluster, tmp_path):
    run = Run(cluster, tmp_path)
    yield run
    print(run.log())  # shown where the test fails
    for job in run.job().split():
        cluster.call("scancel", job)
    while run.job():
        time.sleep(0.2)


def test_faults(run):
    run.start()
    run.await_line(r"0: step \d+/")

    run.cluster.call("scancel", "--signal=TERM", run.job())
    saved = run.await_saved_and_resumed("SIGTERM")

    tasks = run.tasks()
    assert sorted(tasks) == ["0", "1"]
    os.kill(tasks["1"], signal.SIGKILL)
    run.await_line(r"Exit status 137: main.py starts again")
    assert run.await_line(r"from step ([\d,]+)")[1] == f"{saved:,}"
    run.await_line(r"0: step \d+/")

    job = run.job()
    run.cluster.call("scontrol", "requeue", job)  # as SLURM does on a preemption
    requeued = run.await_saved_and_resumed("SIGTERM")
    assert requeued > saved
    assert run.job() == job

    assert "RUNNING" in run.launch("status")
    run.launch("stop")
    assert run.job() == ""
    assert run.launch("status").startswith("clip: stopped by SLURM\n")
    stopped = run.starts()[-1]["step"]
    assert f"saved at step {stopped:,}" in run.log()

    run.start()
    assert run.await_line(r"from step ([\d,]+)")[1] == f"{stopped:,}"
    run.launch("stop")
    ends = [start["end"] and start["end"]["code"] for start in run.starts()]
    assert ends == [42] * 5, ends


def test_the_time_limit(run):
    run.start("--time=4 --grace=60")  # SLURM may be a minute early
    saved = run.await_line(r"SIGTERM: saved at step ([\d,]+)")[1]
    run.await_line(r"goes back to the queue")
    assert run.await_line(r"from step ([\d,]+)")[1] == saved


def test_a_run_that_finishes(run):
    run.start(arguments=TRAIN + " --config.duration='4 steps' --config.eval.every='100 steps'")
    run.await_line("The run has finished")
    while run.job():
        time.sleep(0.2)
    assert run.launch("status").startswith("clip: finished\n")
    assert run.log().count("main.py starts") == 1
    assert (run.workdir / "report.html").exists()


def test_a_user_error_is_not_restarted(run):
    arguments = f"{TRAIN} --config.accum_steps=-1 --workdir=work"
    said = run.launch(f"run --nodes=2 -- {arguments}", code=1)
    assert "clip: failed with exit status 2\n" in said
    assert "accum_steps" in said
    assert run.log().count("main.py starts") == 1


def test_gpus_are_shared_out(run):
    """The node's GPUs are none, so a stand-in says which JAX would be told to drive."""
    python = run.folder / "python"
    python.write_text(
        '#!/bin/sh\n[ "$1" = main.py ] || exec true\n'
        'echo "task $SLURM_PROCID of $SLURM_NTASKS drives $JAX_LOCAL_DEVICE_IDS"\n'
    )
    python.chmod(0o755)
    for options, driven in {
        "--tasks-per-node=2 --gpus-per-node=4": ["0,1", "2,3"],
        "--gres=gpu:3": ["0,1,2"],
        "--nodes=2 --gpus-per-node=4": ["0,1,2,3"] * 2,
        "--tasks-per-node=4 --gpus-per-node=4": ["0", "1", "2", "3"],
    }.items():
        said = run.launch(f"run --python={python} {options} -- {TRAIN} --workdir=work")
        wanted = [f"task {i} of {len(driven)} drives {ids}" for i, ids in enumerate(driven)]
        assert sorted(re.findall("task .* drives .*", said)) == wanted
