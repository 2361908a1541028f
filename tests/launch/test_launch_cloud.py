"""launch/: its conduct with a feigned cloud."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import time

import fake_cloud
import pytest
from fake_cloud import HERE, MAIN

from clip_jax.errors import ExitCode


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> pathlib.Path:
    return fake_cloud.make_repository(tmp_path_factory.mktemp("launch") / "clip_jax")


@pytest.fixture
def cloud(tmp_path, repository):
    cloud = fake_cloud.Cloud(tmp_path, repository)
    yield cloud
    cloud.end()


needs_linux = pytest.mark.skipif(not shutil.which("setsid"), reason="the workers run Linux")


@needs_linux
def test_start_status_logs_stop(cloud):
    cloud.install()
    odd = ['--config.tag=it\'s a  test; $HOME `x` "y" \\ *', "--config.empty=", "", "ünï"]
    command = ["start", *HERE.split(), *MAIN.split(), *odd]
    cloud.ready(command)
    sent = [*MAIN.split()[1:], *odd, "--coordinator=auto"]
    assert cloud.arguments() == [sent, sent]
    assert len(cloud.processes()) == 2

    again = cloud.launch(command)
    assert again.returncode == ExitCode.USER_ERROR
    assert "still running" in again.stderr
    assert "launch/tpu.sh stop" in again.stderr
    assert len(cloud.processes()) == 2
    assert "main.py is running" in cloud.launch(f"setup {HERE}").stderr

    said = cloud.ready(f"status {HERE}").stdout
    assert "clip in us-east5-b, v5litepod-16: ACTIVE" in said
    for worker in ("clip-0", "clip-1"):
        assert re.search(rf"^{worker}: running for 00:\d\d \| step 1/3", said, re.MULTILINE), said

    log = cloud.ready(f"logs {HERE} --worker=1").stdout
    assert "commit abc: main.py --config=configs/vit_b32.py" in log
    assert log.endswith("step 1/3 loss 3.7\n")
    assert "There is no slice 1" in cloud.launch(f"logs {HERE} --slice=1").stderr

    stopped = cloud.ready(f"stop {HERE}")
    assert "billed" in stopped.stderr
    assert cloud.processes() == []
    assert cloud.ready(f"status {HERE}").stdout.count(": stopped |") == 2
    assert cloud.ready(f"stop {HERE}").stdout.count("was not running") == 2


@needs_linux
def test_start_refuses_unless_every_worker_is_ready(cloud):
    command = f"start {HERE} {MAIN}"
    cloud.install()
    shutil.rmtree(cloud.workers[1] / "clip_jax" / "code")
    answer = cloud.launch(command)
    assert answer.returncode == ExitCode.USER_ERROR
    assert "clip-1: not set up" in answer.stderr
    assert cloud.processes() == []
    local = cloud.launch(f"start {HERE} -- --config=configs/vit_b32.py --workdir=runs/x")
    assert "cannot share runs/x" in fake_cloud.one_paragraph(local.stderr)
    for state, wanted in {
        "NONE": "no TPU named clip",
        "PROVISIONING": "launch/tpu.sh wait",
        "SUSPENDED": "launch/tpu.sh delete",
    }.items():
        cloud.set(state=state)
        assert wanted in fake_cloud.one_paragraph(cloud.launch(command).stderr)


@needs_linux
def test_a_run_that_ends_by_itself(cloud):
    cloud.install()
    cloud.set(finish="")
    followed = cloud.ready(f"run {HERE} --type=v5litepod-16 {MAIN}")
    assert "will finish" in followed.stdout
    assert followed.stdout.count(": finished | will finish") == 2
    assert "billed" in followed.stderr
    (cloud.folder / "finish").unlink()
    cloud.set(fail="")
    failed = cloud.launch(f"run {HERE} --type=v5litepod-16 --delete {MAIN}")
    assert failed.returncode == 1
    assert failed.stdout.count(": failed with exit status 3") == 2
    assert cloud.calls()[-1] == "queued-resources delete"


@needs_linux
def test_setup_sends_what_is_committed(cloud):
    head = fake_cloud.git(cloud.repository, "rev-parse", "HEAD").strip()
    stray = cloud.repository / "stray.py"
    stray.touch()
    try:
        for _ in range(2):  # safe to run again
            answer = cloud.ready(f"setup {HERE}")
            assert "Warning: 1 changed or new file(s)" in answer.stderr
        assert "Warning" not in cloud.ready(f"setup {HERE} --ref={head}").stderr
    finally:
        stray.unlink()
    for worker in cloud.workers:
        base = worker / "clip_jax"
        assert (base / "commit").read_text().strip() == head
        assert (base / "code/launch/tpu.sh").exists()
        assert not (base / "code/stray.py").exists()
        log = (worker / "uv.log").read_text()
        assert log.count("venv --quiet") == 1
        assert log.count("requirements.txt jax[tpu]") == 3
    assert fake_cloud.git(cloud.repository, "status", "--porcelain") == ""


@needs_linux
def test_stop_insists(cloud):
    cloud.install()
    for worker in cloud.workers:
        stubborn = fake_cloud.DUMMY_MAIN.replace("lambda *_: sys.exit(42)", "signal.SIG_IGN")
        assert stubborn != fake_cloud.DUMMY_MAIN
        (worker / "clip_jax/code/main.py").write_text(stubborn)
    cloud.ready(f"start {HERE} {MAIN}")
    cloud.arguments()
    pids = cloud.processes()
    for worker in cloud.workers:
        command = ["bash", "clip_jax_worker.sh", "stop", "1"]
        subprocess.run(command, cwd=worker, env=cloud.env | {"HOME": str(worker)}, check=True)
    deadline = time.monotonic() + 20  # a killed process takes a moment on a busy machine
    while cloud.processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert cloud.processes() == []
    listed = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True).stdout
    groups = [int(group) for group, state in map(str.split, listed.splitlines()) if state[0] != "Z"]
    assert not set(pids) & set(groups)


@needs_linux
def test_several_slices(tmp_path, repository):
    cloud = fake_cloud.Cloud(tmp_path, repository, slices=2)
    try:
        cloud.install()
        cloud.ready(f"start {HERE} {MAIN}")
        assert len(cloud.arguments()) == 4
        assert (
            len(re.findall(r"^clip-[01]-[01]: running", cloud.ready(f"status {HERE}").stdout, re.M))
            == 4
        )
        assert "step 1/3" in cloud.ready(f"logs {HERE} --slice=1 --worker=1").stdout
        cloud.ready(f"stop {HERE}")
        assert cloud.processes() == []
    finally:
        cloud.end()


@needs_linux
@pytest.mark.parametrize("told_by", ["request", "node"])
def test_watch_outlives_a_preemption(told_by, cloud):
    cloud.set(state="NONE")
    with cloud.watched("--type=v5litepod-16 --spot --watch --delete") as watch:
        first = cloud.arguments()
        if told_by == "request":
            cloud.set(state="SUSPENDED")
        else:  # as at first: the workers are gone, their request is still ACTIVE
            cloud.set(node="PREEMPTED")
        cloud.end()
        for worker in cloud.workers:
            (worker / "argv.json").unlink()
        assert cloud.arguments() == first
        assert len(cloud.processes()) == 2
        cloud.set(finish="")
        said, _ = watch.communicate(timeout=90)
    assert watch.returncode == 0, said
    assert "The TPU was preempted" in said
    assert "The run is over: finished." in said
    wanted = ["create", "delete", "create", "delete"]
    changes = [call.split()[1] for call in cloud.calls() if re.search("create|delete", call)]
    assert changes == wanted


@needs_linux
@pytest.mark.parametrize(
    ("change", "code", "wanted"),
    [
        ({"fail": ""}, 1, r"will fail.*failed with exit status 3.*run is over: failed"),
        ({"state": "NONE"}, 2, r"was deleted meanwhile"),
    ],
)
def test_watch_ends_without_a_preemption(change, code, wanted, cloud):
    cloud.install()
    with cloud.watched("--type=v5litepod-16 --watch") as watch:
        cloud.arguments()
        cloud.set(**change)
        said, _ = watch.communicate(timeout=90)
    assert watch.returncode == code
    assert re.search(wanted, said, re.DOTALL), said
    assert "queued-resources create" not in cloud.calls()


@needs_linux
def test_watch_starts_again_what_missed_a_host(cloud):
    """Exit status 42; a user error, with 2, would only come back."""
    cloud.install()
    with cloud.watched("--type=v5litepod-16 --watch") as watch:
        first = cloud.arguments()
        for worker in cloud.workers:
            (worker / "argv.json").unlink()
        cloud.set(miss="")
        fake_cloud.wait_until(lambda: not cloud.processes())
        (cloud.folder / "miss").unlink()
        assert cloud.arguments() == first
        cloud.set(finish="")
        said, _ = watch.communicate(timeout=90)
    assert watch.returncode == 0, said
    assert "The run is lost." in said
    assert "The run is over: finished." in said


def starts(cloud) -> list[int]:
    """Returns how often each worker started main.py."""
    logs = [worker / "clip_jax" / "run.log" for worker in cloud.workers]
    return [len(re.findall("^===.*main.py", log.read_text(), re.MULTILINE)) for log in logs]


@needs_linux
def test_watch_gives_up_on_a_run_that_is_lost_at_once_each_time(cloud):
    cloud.install()
    cloud.set(miss="")
    command = f"run {HERE} --type=v5litepod-16 --watch --max-restarts=2 --delete {MAIN}"
    answer = cloud.launch(command)
    assert answer.returncode == 1
    assert "lost 3 times in a row" in answer.stderr
    assert "--max-restarts=2" in answer.stderr
    assert "The run is over: lost." in answer.stderr
    assert "will miss" in answer.stdout  # the end of the log
    assert cloud.calls()[-1] == "queued-resources delete"
    assert cloud.calls().count("tpu-vm scp") == 3


@needs_linux
def test_watch_does_not_count_what_is_lost_later(cloud):
    """With a limit of 1, a run that went on for a while is started again a third time."""
    cloud.install()
    cloud.set(miss="")
    with cloud.watched("--watch --max-restarts=1 --type=v6e-8", TPU_STEADY="-1") as watch:
        fake_cloud.wait_until(lambda: cloud.calls().count("tpu-vm scp") >= 3)
        (cloud.folder / "miss").unlink()
        cloud.set(finish="")
        said, _ = watch.communicate(timeout=90)
    assert watch.returncode == 0, said


@needs_linux
def test_watch_does_not_start_again_what_was_stopped(cloud):
    cloud.install()
    with cloud.watched("--type=v5litepod-16 --watch") as watch:
        cloud.arguments()
        # Asked on one host, all of a run save and end: this one before its own stop comes.
        worker = cloud.workers[1]
        pid = int((worker / "clip_jax/run.pid").read_text())
        os.kill(pid, signal.SIGTERM)
        fake_cloud.wait_until(lambda: (worker / "clip_jax/run.status").exists())
        assert (worker / "clip_jax/run.status").read_text() == "42\n"
        cloud.ready(f"stop {HERE}")
        said, _ = watch.communicate(timeout=90)
    assert watch.returncode == 1
    assert "The run is over: stopped." in said
    assert starts(cloud) == [1, 1]
    assert cloud.ready(f"status {HERE}").stdout.count(": stopped") == 2


def test_watch_gives_up_on_a_refused_request(cloud):
    cloud.set(state="NONE", granted="FAILED")
    answer = cloud.launch(f"run {HERE} --type=v5litepod-16 --spot --watch {MAIN}")
    assert answer.returncode == ExitCode.USER_ERROR
    assert "became FAILED instead of ACTIVE" in answer.stderr
    assert 3 <= cloud.calls().count("queued-resources create") <= 5


def test_watch_does_not_ask_again_for_what_was_deleted(cloud):
    cloud.set(state="NONE", granted="WAITING_FOR_RESOURCES")
    command = shlex.split(f"run {HERE} --type=v5litepod-16 --spot --watch {MAIN}")
    with subprocess.Popen(
        ["launch/tpu.sh", *command],
        cwd=cloud.repository,
        env=cloud.env,
        stderr=subprocess.PIPE,
        text=True,
    ) as watch:
        fake_cloud.wait_until(lambda: "queued-resources create" in cloud.calls())
        fake_cloud.wait_until(lambda: cloud.calls()[-1] == "queued-resources describe")
        cloud.set(state="NONE")
        _, said = watch.communicate(timeout=90)
    assert watch.returncode == ExitCode.USER_ERROR
    assert "deleted while it was waited for" in said
    assert cloud.calls().count("queued-resources create") == 1


def test_delete_asks(cloud):
    kept = cloud.launch(f"delete {HERE}", answer="n\n")
    assert kept.returncode == ExitCode.USER_ERROR
    assert "queued-resources delete" not in cloud.calls()
    assert cloud.launch(f"delete {HERE}").returncode == ExitCode.USER_ERROR
    cloud.ready(f"delete {HERE}", answer="y\n")
    cloud.ready(f"delete {HERE} --yes")
    assert cloud.calls().count("queued-resources delete") == 2


def test_create_and_wait(cloud):
    cloud.set(state="NONE", granted="WAITING_FOR_RESOURCES")
    assert "Asked for clip" in cloud.ready(f"create {HERE} --type=v5litepod-16").stderr
    assert "WAITING_FOR_RESOURCES" in cloud.ready(f"status {HERE}").stdout
    cloud.set(state="ACTIVE")
    assert "billed" in cloud.ready(f"wait {HERE}").stderr
    cloud.set(state="FAILED")
    assert "launch/tpu.sh delete" in fake_cloud.one_paragraph(cloud.launch(f"wait {HERE}").stderr)
