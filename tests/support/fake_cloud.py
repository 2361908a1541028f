"""A feigned Google Cloud whose TPU workers are folders, and a repository to launch from."""

import contextlib
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[2]
HERE = "--name=clip --zone=us-east5-b "
MAIN = " -- --config=configs/vit_b32.py --workdir=gs://bucket/run"

# A training run that lasts until the file finish, or fail, appears in the feigned cloud. By SIGTERM
# it ends with 42, as main.py does.
DUMMY_MAIN = """
import json, os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
pathlib.Path(os.environ["HOME"], "argv.json").write_text(json.dumps(sys.argv[1:]))
print("step 1/3 loss 3.7", flush=True)
while True:
    for name, status in (("finish", 0), ("fail", 3), ("miss", 42)):
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


def make_repository(folder: pathlib.Path) -> pathlib.Path:
    """A committed repository with the real launch/ and little else."""
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
    settings = ("TPU_", "GKE_", "KUEUE_", "PROJECT")
    return {k: v for k, v in os.environ.items() if not k.startswith(settings)} | more


def launch(
    repository, arguments, env=None, answer="", program="launch/tpu.sh"
) -> subprocess.CompletedProcess:
    words = shlex.split(arguments) if isinstance(arguments, str) else arguments
    return subprocess.run(
        [program, *words],
        cwd=repository,
        env=env or environment(),
        input=answer,
        capture_output=True,
        text=True,
        timeout=60,
    )


def one_paragraph(said: str) -> str:
    said = said.strip()
    assert "\n" not in said
    assert 30 < len(said) < 700
    assert said[0].isupper()
    assert said.endswith(".")
    assert "unbound" not in said
    return said


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

    @contextlib.contextmanager
    def watched(self, options: str, **variables: str) -> Iterator[subprocess.Popen]:
        """Begins `launch/tpu.sh run` on this cloud; what it says is one text."""
        with subprocess.Popen(
            ["launch/tpu.sh", "run", *shlex.split(f"{HERE} {options} {MAIN}")],
            cwd=self.repository,
            env=self.env | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def ready(self, arguments, answer=""):
        """Runs `launch`, which must succeed."""
        done = self.launch(arguments, answer)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def calls(self) -> list[str]:
        """Such as "queued-resources create"."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [" ".join(line.split()[:2]) for line in lines]

    def processes(self) -> list[int]:
        """The process ids of live supervisors of main.py."""
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
        """Puts the files on the workers that setup would."""
        for worker in self.workers:
            shutil.copy(self.repository / "launch/clip_jax_worker.sh", worker)
            base = worker / "clip_jax"
            shutil.copytree(self.repository / "configs", base / "code/configs")
            shutil.copy(self.repository / "main.py", base / "code")
            (base / "commit").write_text("abc\n")
            executable(base / "venv/bin/python", FAKE_PYTHON)

    def arguments(self) -> list[list[str]]:
        """Returns the arguments of main.py on every worker; waits until all have started."""
        files = [worker / "argv.json" for worker in self.workers]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        return [json.loads(file.read_text()) for file in files]

    def end(self) -> None:
        for pid in self.processes():
            os.killpg(pid, signal.SIGKILL)


def wait_until(condition, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
