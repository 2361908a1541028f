"""launch/: the commands it would run, and its answers to mistakes.

tests/launch/golden/ holds a command line and below it what --dry-run prints for it. After a change
that is meant, CLIP_JAX_UPDATE_GOLDEN=1 writes them anew; read the difference before you commit it.
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
from fake_cloud import HERE, ROOT

from clip_jax.errors import ExitCode

SCRIPTS = sorted((ROOT / "launch").rglob("*.sh"))
GOLDEN = sorted((ROOT / "tests" / "launch" / "golden").glob("*.txt"))


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> pathlib.Path:
    return fake_cloud.make_repository(tmp_path_factory.mktemp("launch") / "clip_jax")


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
    fake_cloud.executable(tmp_path / "gcloud", "#!/bin/sh\necho called >&2\nexit 1\n")
    env = fake_cloud.environment(PATH=f"{tmp_path}:{os.environ['PATH']}")
    answer = fake_cloud.launch(repository, words, env)
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
    answer = fake_cloud.launch(repository, "--help")
    assert answer.returncode == 0
    for command in re.findall(r"^  ([a-z]+)  ", answer.stdout, re.MULTILINE):
        more = fake_cloud.launch(repository, [command, "--help"])
        assert more.returncode == 0
        assert more.stdout.startswith(f"launch/tpu.sh {command} ")
    for name in ("TPU_NAME", "TPU_ZONE", "PROJECT", "--env", "--dry-run"):
        assert name in answer.stdout


def test_defaults_from_the_environment_and_a_file(repository):
    def words(arguments, **more):
        return fake_cloud.launch(
            repository, f"delete --dry-run {arguments}", fake_cloud.environment(**more)
        ).stdout

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
    "no limit": (f"run {HERE} --type=v6e-8 --watch --max-restarts=often", r"max-restarts.*'often'"),
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


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_paragraph(name, repository, tmp_path):
    fake_cloud.executable(tmp_path / "gcloud", "#!/bin/sh\necho called >&2\nexit 1\n")
    env = fake_cloud.environment(PATH=f"{tmp_path}:{os.environ['PATH']}")
    arguments, wanted = MISTAKES[name]
    answer = fake_cloud.launch(repository, arguments, env)
    assert answer.returncode == ExitCode.USER_ERROR
    said = fake_cloud.one_paragraph(answer.stderr)
    assert re.search(wanted, said), said


def test_without_gcloud(repository, tmp_path):
    for tool in ("bash", "git", "dirname", "cat", "sed", "tr", "wc"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    env = fake_cloud.environment(PATH=str(tmp_path))
    answer = fake_cloud.launch(repository, f"create {HERE} --type=v6e-8", env)
    assert answer.returncode == ExitCode.USER_ERROR
    assert re.search(r"cloud\.google\.com/sdk.*--dry-run", fake_cloud.one_paragraph(answer.stderr))
    assert (
        fake_cloud.launch(repository, f"create {HERE} --type=v6e-8 --dry-run", env).returncode == 0
    )
