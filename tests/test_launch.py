"""launch/: the commands it would run, its answers to mistakes, its conduct with a feigned cloud.

tests/golden/launch/ holds a command line and below it what --dry-run prints for it. After a change
that is meant, CLIP_JAX_UPDATE_GOLDEN=1 writes them anew; read the difference before you commit it.
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

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "launch").rglob("*.sh"))
GOLDEN = sorted((ROOT / "tests" / "golden" / "launch").glob("*.txt"))
HERE = "--name=clip --zone=us-east5-b "
MAIN = " -- --config=configs/vit_b32.py --workdir=gs://bucket/run"

# A training run that lasts until the file finish, or fail, appears in the feigned cloud.
DUMMY_MAIN = """
import json, os, pathlib, sys, time
pathlib.Path(os.environ["HOME"], "argv.json").write_text(json.dumps(sys.argv[1:]))
print("step 1/3 loss 3.7", flush=True)
while True:
    for name, status in (("finish", 0), ("fail", 3)):
        if os.path.exists(os.path.join(os.environ["CLOUD"], name)):
            print(f"will {name}")
            sys.exit(status)
    time.sleep(0.02)
"""

# Queued resources that are there at once, and workers that are folders of this machine.
FAKE_GCLOUD = """#!/bin/bash
printf '%s\\n' "${*:3}" >>"$CLOUD/calls"
state=$(cat "$CLOUD/state")
option() { printf '%s\\n' "${@:2}" | sed -n "s/^--$1=//p"; }
workers() { if [ "$1" = all ]; then seq 0 $((WORKERS - 1)); else echo "$1"; fi; }
case "$3 $4" in
  "queued-resources describe")
    [ "$state" != NONE ] || { echo "NOT_FOUND: Resource was not found." >&2; exit 1; }
    printf '%s\\t%s\\t%s\\n' "$state" v5litepod-16 "$SLICE_NAMES"
    ;;
  "queued-resources create")
    cat "$CLOUD/granted" >"$CLOUD/state"
    echo READY >"$CLOUD/node"
    ;;
  "queued-resources delete")
    rm -rf "$CLOUD"/workers/*/clip_jax*
    echo NONE >"$CLOUD/state"
    ;;
  "tpu-vm describe") cat "$CLOUD/node" ;;
  "tpu-vm scp")
    for worker in $(workers "$(option worker "$@")"); do
      cp "$5" "$6" "$CLOUD/workers/${7%:}-$worker/"
    done
    ;;
  "tpu-vm ssh")
    result=0
    for worker in $(workers "$(option worker "$@")"); do
      cd "$CLOUD/workers/$5-$worker" || exit
      HOME=$PWD bash -c "$(option command "$@")" || result=$?
    done
    exit $result
    ;;
esac
"""

FAKE_UV = """#!/bin/sh
echo "$*" >>"$HOME/uv.log"
[ "$1" != venv ] || install -D "$CLOUD/python" "$5/bin/python"
"""

# Of a virtual environment in which every import succeeds.
FAKE_PYTHON = f"""#!/bin/sh
[ "$1" = -c ] || exec {shlex.quote(sys.executable)} "$@"
"""


def executable(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def git(folder: pathlib.Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=x", "-c", "user.email=x@example.com", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> pathlib.Path:
    """A committed repository with the real launch/ and little else."""
    folder = tmp_path_factory.mktemp("launch") / "clip_jax"
    shutil.copytree(ROOT / "launch", folder / "launch")
    (folder / "configs").mkdir()
    for name in ("__init__", "default", "quickstart", "vit_b32"):
        (folder / "configs" / f"{name}.py").touch()
    (folder / "main.py").write_text(DUMMY_MAIN)
    (folder / "requirements.txt").write_text("jax\n")
    (folder / "tpu.env").write_text("TPU_NAME=clip\nTPU_ZONE=us-east5-b\nPROJECT=my-project\n")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message=All")
    return folder


def environment(**more: str) -> dict[str, str]:
    """This process's, without what would change the answers."""
    return {
        k: v for k, v in os.environ.items() if not k.startswith("TPU_") and k != "PROJECT"
    } | more


def launch(repository, arguments, env=None, answer="") -> subprocess.CompletedProcess:
    words = shlex.split(arguments) if isinstance(arguments, str) else arguments
    return subprocess.run(
        ["launch/tpu.sh", *words],
        cwd=repository,
        env=env or environment(),
        input=answer,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_shellcheck():
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=path)
    assert shellcheck, "shellcheck is missing: pip install -r requirements-dev.txt"
    assert len(SCRIPTS) >= 3
    found = subprocess.run([shellcheck, "-x", *SCRIPTS], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    for script in SCRIPTS:
        assert len(script.read_text().splitlines()) < 300


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.stem)
def test_dry_run(golden, repository, tmp_path):
    command = golden.read_text().splitlines()[0]
    words = shlex.split(command.removeprefix("$ launch/tpu.sh "))
    # gcloud is on the PATH, but whoever calls it fails.
    executable(tmp_path / "gcloud", "#!/bin/sh\necho called >&2\nexit 1\n")
    env = environment(PATH=f"{tmp_path}:{os.environ['PATH']}")
    answer = launch(repository, words, env)
    assert answer.returncode == 0, answer.stderr
    assert "called" not in answer.stderr
    got = re.sub(r"\b[0-9a-f]{40}\b", "COMMIT", f"{command}\n{answer.stdout}")
    if os.environ.get("CLIP_JAX_UPDATE_GOLDEN"):
        golden.write_text(got)
    assert got == golden.read_text()
    assert subprocess.run(["bash", "-n"], input=answer.stdout, text=True).returncode == 0


def test_dry_run_has_a_golden_for_every_command():
    called = {path.read_text().split()[2] for path in GOLDEN}
    commands = {"create", "wait", "setup", "start", "logs", "status", "stop", "delete", "run"}
    assert called == commands


def test_help(repository):
    answer = launch(repository, "--help")
    assert answer.returncode == 0
    for command in re.findall(r"^  ([a-z]+)  ", answer.stdout, re.MULTILINE):
        more = launch(repository, [command, "--help"])
        assert more.returncode == 0
        assert more.stdout.startswith(f"launch/tpu.sh {command} ")
    for name in ("TPU_NAME", "TPU_ZONE", "PROJECT", "--env", "--dry-run"):
        assert name in answer.stdout


def test_defaults_from_the_environment_and_a_file(repository):
    def words(arguments, **more):
        return launch(repository, f"delete --dry-run {arguments}", environment(**more)).stdout

    assert "delete clip --force" in words("--env=tpu.env")
    assert "--zone=us-east5-b --project=my-project" in words("--env tpu.env")
    assert "delete mine " in words("--name=mine --env=tpu.env")
    assert "delete other " in words("", TPU_NAME="other", TPU_ZONE="us-east5-b")
    assert "delete clip --force" in words("--env=tpu.env", TPU_NAME="other")


# Arguments, and what the answer must name.
MISTAKES = {
    "no command": ("", r"setup.*--help"),
    "unknown command": ("creat", r"'creat'.*create"),
    "no name": ("status --zone=us-east5-b", r"--name=clip.*TPU_NAME"),
    "bad name": ("status --name=Clip --zone=us-east5-b", r"'Clip'.*lower-case"),
    "no zone": ("status --name=clip", r"--zone=us-east5-b.*TPU_ZONE"),
    "a region": ("status --name=clip --zone=us-east5", r"'us-east5'.*region"),
    "no type": (f"create {HERE}", r"--type=v5litepod-16"),
    "unknown type": (f"create {HERE} --type=h100-8", r"'h100-8'.*v5litepod-N.*--runtime"),
    "a nickname": (f"create {HERE} --type=v5e-16", r"v5e-16.*--type=v5litepod-16"),
    "spot and reserved": (f"create {HERE} --type=v6e-8 --spot --reserved", r"--spot.*--reserved"),
    "bad number": (f"create {HERE} --type=v6e-8 --slices=two", r"--slices.*'two'"),
    "no slices": (f"create {HERE} --type=v6e-8 --slices=0", r"--slices is 0"),
    "unknown option": (f"stop {HERE} --spot", r"stop.*--spot.*--help"),
    "no value": (f"stop {HERE} --project", r"--project.*VALUE"),
    "needless value": (f"delete {HERE} --yes=1", r"--yes.*no value"),
    "stray word": (f"stop {HERE} now", r"'now'"),
    "needless --": (f"stop {HERE} -- --config=x", r"stop.*--"),
    "no env file": ("stop --env=none.env", r"none\.env.*TPU_NAME"),
    "no config": (f"start {HERE} -- --workdir=gs://bucket/run", r"--config"),
    "no such config": (
        f"start {HERE} -- --config=configs/vit_b33.py",
        r"vit_b33.*quickstart.py vit_b32.py",
    ),
    "config elsewhere": (f"start {HERE} -- --config=/tmp/mine.py", r"/tmp/mine\.py.*inside"),
    "local workdir": (
        f"run {HERE} --type=v5litepod-16 -- --config=configs/vit_b32.py --workdir=runs/x",
        r"v5litepod-16.*runs/x.*--workdir=gs://",
    ),
    "default workdir": (
        f"run {HERE} --type=v5litepod-8 --slices=2 -- --config=configs/vit_b32.py:smoke",
        r"default workdir.*--workdir=gs://",
    ),
    "no such ref": (f"setup {HERE} --dry-run --ref=v99", r"'v99'.*--ref"),
}


def one_paragraph(said: str) -> str:
    said = said.strip()
    assert "\n" not in said
    assert 30 < len(said) < 700
    assert said[0].isupper()
    assert said.endswith(".")
    assert "unbound" not in said
    return said


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_paragraph(name, repository, tmp_path):
    executable(tmp_path / "gcloud", "#!/bin/sh\necho called >&2\nexit 1\n")
    env = environment(PATH=f"{tmp_path}:{os.environ['PATH']}")
    arguments, wanted = MISTAKES[name]
    answer = launch(repository, arguments, env)
    assert answer.returncode == 1
    said = one_paragraph(answer.stderr)
    assert re.search(wanted, said), said


def test_without_gcloud(repository, tmp_path):
    for tool in ("bash", "git", "dirname", "cat", "sed", "tr", "wc"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    env = environment(PATH=str(tmp_path))
    answer = launch(repository, f"create {HERE} --type=v6e-8", env)
    assert answer.returncode == 1
    assert re.search(r"cloud\.google\.com/sdk.*--dry-run", one_paragraph(answer.stderr))
    assert launch(repository, f"create {HERE} --type=v6e-8 --dry-run", env).returncode == 0


class Cloud:
    """A feigned Google Cloud in a folder, two workers a slice."""

    def __init__(self, folder: pathlib.Path, repository: pathlib.Path, slices: int = 1):
        self.folder, self.repository = folder, repository
        nodes = ["clip"] if slices == 1 else [f"clip-{i}" for i in range(slices)]
        self.workers = [folder / "workers" / f"{node}-{i}" for node in nodes for i in range(2)]
        for worker in self.workers:
            executable(worker / ".local/bin/uv", FAKE_UV)
        executable(folder / "python", FAKE_PYTHON)
        executable(folder / "bin/gcloud", FAKE_GCLOUD)
        executable(folder / "bin/hostname", '#!/bin/sh\nbasename "$HOME"\n')
        self.set(state="ACTIVE", granted="ACTIVE", node="READY", calls="")
        self.env = environment(
            PATH=f"{folder / 'bin'}:{os.environ['PATH']}",
            CLOUD=str(folder),
            SLICE_NAMES=";".join(nodes),
            WORKERS="2",
            TPU_POLL="0.1",
        )

    def set(self, **files: str) -> None:
        for name, text in files.items():
            (self.folder / name).write_text(text)

    def launch(self, arguments, answer=""):
        return launch(self.repository, arguments, self.env, answer)

    def ready(self, arguments, answer=""):
        """Like launch, and it must succeed."""
        done = self.launch(arguments, answer)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def calls(self) -> list[str]:
        """Such as "queued-resources create"."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [" ".join(line.split()[:2]) for line in lines]

    def processes(self) -> list[int]:
        """Of the supervisors of main.py that are alive."""
        found = []
        for file in self.folder.glob("workers/*/clip_jax/run.pid"):
            pid = int(file.read_text())
            alive = subprocess.run(
                ["ps", "-p", str(pid), "-o", "stat="], capture_output=True, text=True
            )
            if alive.stdout.strip() and not alive.stdout.startswith("Z"):
                found.append(pid)
        return found

    def install(self) -> None:
        """What setup would leave on the workers."""
        for worker in self.workers:
            shutil.copy(self.repository / "launch/clip_jax_worker.sh", worker)
            base = worker / "clip_jax"
            shutil.copytree(self.repository / "configs", base / "code/configs")
            shutil.copy(self.repository / "main.py", base / "code")
            (base / "commit").write_text("abc\n")
            executable(base / "venv/bin/python", FAKE_PYTHON)

    def arguments(self) -> list[list[str]]:
        """That main.py was given, on every worker; waits until all have started."""
        files = [worker / "argv.json" for worker in self.workers]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        return [json.loads(file.read_text()) for file in files]

    def end(self) -> None:
        for pid in self.processes():
            os.killpg(pid, signal.SIGKILL)


def wait_until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.fixture
def cloud(tmp_path, repository):
    cloud = Cloud(tmp_path, repository)
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
    assert again.returncode == 1
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
    assert answer.returncode == 1
    assert "clip-1: not set up" in answer.stderr
    assert cloud.processes() == []
    local = cloud.launch(f"start {HERE} -- --config=configs/vit_b32.py --workdir=runs/x")
    assert "cannot share runs/x" in one_paragraph(local.stderr)
    for state, wanted in {
        "NONE": "no TPU named clip",
        "PROVISIONING": "launch/tpu.sh wait",
        "SUSPENDED": "launch/tpu.sh delete",
    }.items():
        cloud.set(state=state)
        assert wanted in one_paragraph(cloud.launch(command).stderr)


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
    head = git(cloud.repository, "rev-parse", "HEAD").strip()
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
    assert git(cloud.repository, "status", "--porcelain") == ""


@needs_linux
def test_stop_insists(cloud):
    cloud.install()
    for worker in cloud.workers:
        stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
        (worker / "clip_jax/code/main.py").write_text(stubborn + DUMMY_MAIN)
    cloud.ready(f"start {HERE} {MAIN}")
    cloud.arguments()
    pids = cloud.processes()
    for worker in cloud.workers:
        command = ["bash", "clip_jax_worker.sh", "stop", "1"]
        subprocess.run(command, cwd=worker, env=cloud.env | {"HOME": str(worker)}, check=True)
    assert cloud.processes() == []
    listed = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True).stdout
    groups = [int(group) for group, state in map(str.split, listed.splitlines()) if state[0] != "Z"]
    assert not set(pids) & set(groups)


@needs_linux
def test_several_slices(tmp_path, repository):
    cloud = Cloud(tmp_path, repository, slices=2)
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
    command = shlex.split(f"run {HERE} --type=v5litepod-16 --spot --watch --delete {MAIN}")
    with subprocess.Popen(
        ["launch/tpu.sh", *command],
        cwd=cloud.repository,
        env=cloud.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as watch:
        try:
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
            said, _ = watch.communicate(timeout=30)
        finally:
            watch.kill()
    assert watch.returncode == 0, said
    assert "The TPU was preempted" in said
    assert "The run is over: finished." in said
    wanted = ["create", "delete", "create", "delete"]
    changes = [call.split()[1] for call in cloud.calls() if re.search("create|delete", call)]
    assert changes == wanted


@needs_linux
@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"fail": ""}, r"will fail.*failed with exit status 3.*run is over: failed"),
        ({"state": "NONE"}, r"was deleted meanwhile"),
    ],
)
def test_watch_ends_without_a_preemption(change, wanted, cloud):
    cloud.install()
    watch = subprocess.Popen(
        ["launch/tpu.sh", *shlex.split(f"run {HERE} --type=v5litepod-16 --watch {MAIN}")],
        cwd=cloud.repository,
        env=cloud.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with watch:
        cloud.arguments()
        cloud.set(**change)
        said, _ = watch.communicate(timeout=30)
    assert watch.returncode == 1
    assert re.search(wanted, said, re.DOTALL), said
    assert "queued-resources create" not in cloud.calls()


def test_watch_gives_up_on_a_refused_request(cloud):
    cloud.set(state="NONE", granted="FAILED")
    answer = cloud.launch(f"run {HERE} --type=v5litepod-16 --spot --watch {MAIN}")
    assert answer.returncode == 1
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
        wait_until(lambda: "queued-resources create" in cloud.calls())
        wait_until(lambda: cloud.calls()[-1] == "queued-resources describe")
        cloud.set(state="NONE")
        _, said = watch.communicate(timeout=30)
    assert watch.returncode == 1
    assert "deleted while it was waited for" in said
    assert cloud.calls().count("queued-resources create") == 1


def test_delete_asks(cloud):
    kept = cloud.launch(f"delete {HERE}", answer="n\n")
    assert kept.returncode == 1
    assert "queued-resources delete" not in cloud.calls()
    assert cloud.launch(f"delete {HERE}").returncode == 1
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
    assert "launch/tpu.sh delete" in one_paragraph(cloud.launch(f"wait {HERE}").stderr)
