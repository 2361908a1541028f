"""launch/gke.sh: its manifests against JobSet's schema and JAX, its conduct with a feigned cluster.

tests/launch/golden/gke/ holds a command line and below it what --dry-run prints for it; see
test_launch.py.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import fake_cloud
import fake_kubernetes
import pytest
import yaml
from fake_cloud import MAIN, ROOT
from jax._src.clusters import cloud_tpu_cluster

from clip_jax.errors import ExitCode

GOLDEN = sorted((ROOT / "tests" / "launch" / "golden" / "gke").glob("*.txt"))
IMAGE = "us-docker.pkg.dev/my-project/clip/clip_jax"
HERE = f"--name=clip --image={IMAGE}:v1 "


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> pathlib.Path:
    return fake_cloud.make_repository(tmp_path_factory.mktemp("launch") / "clip_jax")


@pytest.fixture
def cluster(tmp_path, repository):
    return fake_kubernetes.Cluster(tmp_path, repository)


def manifest(cluster, options: str, main: str | list[str] = MAIN) -> dict:
    """Returns what run --dry-run prints, without a call of kubectl."""
    words = shlex.split(main) if isinstance(main, str) else main
    done = cluster.ready(["run", "--dry-run", *HERE.split(), *options.split(), *words])
    assert cluster.calls() == []
    return yaml.safe_load(done.stdout)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.stem)
def test_dry_run(golden, cluster):
    command = golden.read_text().splitlines()[0]
    answer = cluster.ready(shlex.split(command.removeprefix("$ launch/gke.sh ")))
    assert cluster.calls() == []
    head = fake_cloud.git(cluster.repository, "rev-parse", "HEAD").strip()
    got = f"{command}\n{answer.stdout}".replace(head, "COMMIT").replace(head[:12], "COMMIT")
    if os.environ.get("CLIP_JAX_UPDATE_GOLDEN"):
        golden.write_text(got)
    assert got == golden.read_text()


def test_dry_run_has_a_golden_for_every_command():
    called = {path.read_text().split()[2] for path in GOLDEN}
    assert called == {"build", "run", "status", "logs", "stop"}


def test_help(repository):
    answer = fake_cloud.launch(repository, "--help", program="launch/gke.sh")
    assert answer.returncode == 0
    for command in re.findall(r"^  ([a-z]+)  ", answer.stdout, re.MULTILINE):
        more = fake_cloud.launch(repository, [command, "--help"], program="launch/gke.sh")
        assert more.returncode == 0
        assert more.stdout.startswith(f"launch/gke.sh {command} ")


# Options, and for them: accelerator, topology, hosts of a slice, chips of a host.
MACHINES = {
    "--type=v5litepod-1": ("tpu-v5-lite-podslice", "1x1", 1, 1),
    "--type=v5litepod-8": ("tpu-v5-lite-podslice", "2x4", 1, 8),
    "--type=v5litepod-8 --hosts=2": ("tpu-v5-lite-podslice", "2x4", 2, 4),
    "--type=v5litepod-256": ("tpu-v5-lite-podslice", "16x16", 64, 4),
    "--type=v5litepod --topology=16x16": ("tpu-v5-lite-podslice", "16x16", 64, 4),
    "--type=v6e-64 --slices=2": ("tpu-v6e-slice", "8x8", 16, 4),
    "--type=v6e-8 --slices=08": ("tpu-v6e-slice", "2x4", 1, 8),
    "--type=v4-8": ("tpu-v4-podslice", "2x2x1", 1, 4),
    "--type=v5p-128 --spot": ("tpu-v5p-slice", "4x4x4", 16, 4),
    "--type=v5p-1024": ("tpu-v5p-slice", "8x8x8", 128, 4),
    "--type=tpu7x-2": ("tpu7x", "1x1x1", 1, 1),
    "--type=tpu7x-128 --slices=3 --queue=lq": ("tpu7x", "4x4x4", 16, 4),
    "--type=tpu7x-512 --topology=4x4x16": ("tpu7x", "4x4x16", 64, 4),
    "--type=a3-highgpu-8g": ("nvidia-h100-80gb", None, 1, 8),
    "--type=a3-highgpu-8g --hosts=4 --service-account=trainer": ("nvidia-h100-80gb", None, 4, 8),
    "--type=a2-ultragpu-4g --hosts=2": ("nvidia-a100-80gb", None, 2, 4),
    "--type=a4-highgpu-8g --hosts=16 --spot": ("nvidia-b200", None, 16, 8),
}


@pytest.mark.parametrize("options", MACHINES)
def test_machines(options, cluster):
    accelerator, topology, hosts, chips = MACHINES[options]
    made = manifest(cluster, options)
    assert fake_kubernetes.complaints(made) == []
    (replicated,) = made["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    labels = pod["nodeSelector"]
    resource = "google.com/tpu" if topology else "nvidia.com/gpu"
    key = "cloud.google.com/gke-" + ("tpu-accelerator" if topology else "accelerator")
    assert labels[key] == accelerator
    assert labels.get("cloud.google.com/gke-tpu-topology") == topology
    assert job["completions"] == hosts
    assert container["resources"]["limits"] == {resource: chips}
    slices = re.search(r"--slices=0*(\d+)", options)
    assert replicated["replicas"] == int(slices[1] if slices else 1)
    # A slice of one host shares its pool with others; one of several is a pool.
    exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology" in str(made["metadata"])
    assert exclusive == bool(topology and hosts > 1)
    assert ("gke-spot" in str(pod["tolerations"])) == ("--spot" in options)
    assert (labels.get("cloud.google.com/gke-spot") == "true") == ("--spot" in options)
    queue = made["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
    assert queue == ("lq" if "--queue" in options else None)
    assert pod.get("serviceAccountName") == ("trainer" if "--service" in options else None)
    assert pod["terminationGracePeriodSeconds"] >= 60


# Changes of a manifest that the schema or Kubernetes' own rules have to refuse.
WRONG = {
    "a field of JobSet that does not exist": ("  network:", "  networks: 1\n  network:"),
    "a misspelt field of the pod": ("nodeSelector:", "nodeSelectors:"),
    "a word for a number": ("replicas: 2", "replicas: two"),
    "an action that does not exist": ("action: FailJobSet", "action: StopJobSet"),
    "a number as a label": ('"true", effect', "1, effect"),
    "an operator without values": ("operator: NotIn", "operators: NotIn"),
    "codes out of order": ("[42, 127,", "[127, 42,"),
    "a container that does not exist": ("containerName: main", "containerName: trainer"),
    "pods that start again by themselves": ("restartPolicy: Never", "restartPolicy: OnFailure"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_manifest_is_refused(name, cluster):
    """So the other tests' "no complaints" says something."""
    done = cluster.ready(f"run --dry-run {HERE} --type=v6e-64 --slices=2 --spot {MAIN}")
    old, new = WRONG[name]
    assert old in done.stdout
    assert fake_kubernetes.complaints(yaml.safe_load(done.stdout)) == []
    assert fake_kubernetes.complaints(yaml.safe_load(done.stdout.replace(old, new, 1)))


def test_the_exit_codes_that_start_again(cluster):
    """Equal to those of the TPU VMs' workers and of clip_jax/errors.py."""
    made = manifest(cluster, "--type=v6e-64 --max-restarts=7")
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 7
    again = {
        code for code in range(1, 256) if fake_kubernetes.action(made, code) == "RestartJobSet"
    }
    assert again == {ExitCode.RESUME, *range(127, 256)}
    others = {fake_kubernetes.action(made, code) for code in range(1, 256) if code not in again}
    assert others == {"FailJobSet"}
    for code in (1, 42, 137, 143):
        taken = fake_kubernetes.action(made, code, disrupted=True)
        assert taken == "RestartJobSetAndIgnoreMaxRestarts"

    worker = (ROOT / "launch" / "clip_jax_worker.sh").read_text()
    script = worker.rpartition('"$@"')[0]
    script += 'BASE=$1; for code in $(seq 255); do echo "$code" >"$BASE/run.status"; '
    script += 'if may_resume; then echo "$code"; fi; done'
    command = ["bash", "-c", script, "worker", str(cluster.folder)]
    env = cluster.env | {"HOME": str(cluster.folder)}
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert set(map(int, said.split())) == again


@pytest.mark.parametrize("options", ["--type=v5litepod-8 --slices=2", "--type=v6e-64 --slices=3",
                                     "--type=tpu7x-16", "--type=v5litepod-1"])  # fmt: skip
def test_tpu_hosts_find_each_other(options, cluster, monkeypatch):
    """By JAX's own code, with the environment that each pod gets."""
    started = fake_kubernetes.pods(manifest(cluster, options))
    names = [pod["hostname"] for pod in started]
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda _: ("Not Found", 404))
    monkeypatch.setattr(
        cloud_tpu_cluster.socket, "gethostbyname", lambda name: str(names.index(name))
    )
    for variable in ("TPU_PROCESS_ADDRESSES", "JAX_COORDINATOR_PORT"):
        monkeypatch.delenv(variable, raising=False)
    jax_cluster = cloud_tpu_cluster.GkeTpuCluster
    for index, pod in enumerate(started):
        assert pod["args"][-1] == "--coordinator=auto"
        assert pod["env"]["JAX_PLATFORMS"] == "tpu,cpu"
        with monkeypatch.context() as patch:
            for name, value in pod["env"].items():
                patch.setenv(name, value)
            assert jax_cluster.is_env_present()
            found = jax_cluster.auto_detect_unset_distributed_params(
                None, None, None, None, "gketpu", 10
            )
            assert found == (f"{names[0]}:8482", len(names), index, None)
            within = pod["env"]["TPU_WORKER_HOSTNAMES"].split(",")
            assert within[int(pod["env"]["TPU_WORKER_ID"])] == pod["hostname"]


def test_gpu_hosts_find_each_other(cluster):
    started = fake_kubernetes.pods(manifest(cluster, "--type=a3-highgpu-8g --hosts=3"))
    for index, pod in enumerate(started):
        first = f"--coordinator={started[0]['hostname']}:8476"
        assert pod["args"][-3:] == [first, "--processes=3", f"--process={index}"]
    (alone,) = fake_kubernetes.pods(manifest(cluster, "--type=a3-highgpu-8g"))
    assert alone["args"] == MAIN.split()[1:]


def test_arguments_arrive_as_typed(cluster):
    odd = [
        '--config.tag=it\'s a  "test": #x {y} [z] & *a !b % @ `c` \\n \\',
        "$(HOST) $$ $HOST",
        "",
        "ünï",
    ]
    words = ["--", *MAIN.split()[1:], *odd, "--coordinator=clip-slice-0-0.clip:1"]
    (pod,) = fake_kubernetes.pods(manifest(cluster, "--type=v6e-8", words))
    assert pod["args"] == words[1:]


def test_run_status_logs_stop(cluster):
    run = f"run {HERE} --namespace=team --type=v6e-64 --slices=2 {MAIN}"
    assert "launch/gke.sh logs --name=clip --namespace=team --follow" in cluster.ready(run).stderr
    assert fake_kubernetes.complaints(cluster.manifest()) == []
    before = len(cluster.calls())
    again = cluster.launch(run)
    assert again.returncode == ExitCode.USER_ERROR
    assert "is there already" in fake_cloud.one_paragraph(again.stderr)
    assert len(cluster.calls()) == before + 1
    said = cluster.ready("status --name=clip").stdout
    assert said.startswith("clip: running or waiting\n")
    assert "clip-slice-0-0-x2k4v Running" in said
    assert "step 1/3" in cluster.ready("logs --name=clip --slice=1 --worker=3 --follow").stdout
    chosen = "job-index=1,batch.kubernetes.io/job-completion-index=3"
    assert chosen in cluster.calls()[-1]
    assert "resumes" in cluster.ready("stop --name=clip --namespace=team").stderr
    assert cluster.calls()[-1] == (
        "--namespace=team delete jobset clip --cascade=foreground --wait"
    )
    assert "no run named clip" in fake_cloud.one_paragraph(
        cluster.launch("status --name=clip").stderr
    )
    for state in ("Failed", "Completed"):
        cluster.ready(run)
        (cluster.folder / "state").write_text(state)
    cluster.ready(run)  # takes the place of what has ended


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        ('error: the server doesn\'t have a resource type "jobset"', r"knows no JobSet.*install"),
        ("Unable to connect to the server: dial tcp: i/o timeout", r"i/o timeout.*get-credentials"),
    ],
)
def test_a_cluster_that_cannot(error, wanted, cluster):
    (cluster.folder / "error").write_text(error)
    answer = cluster.launch(f"run {HERE} --type=v6e-8 {MAIN}")
    assert answer.returncode == ExitCode.USER_ERROR
    assert re.search(wanted, fake_cloud.one_paragraph(answer.stderr))


def run(options: str) -> str:
    return f"run {HERE} {options} {MAIN}"


# Arguments, and what the answer must name.
MISTAKES = {
    "no command": ("", r"build.*--help"),
    "a TPU VM's command": ("create", r"'create'.*run"),
    "no name": (f"run --type=v6e-8 --image=a/b {MAIN}", r"--name=clip.*GKE_NAME"),
    "bad name": ("status --name=Clip", r"'Clip'.*lower-case"),
    "long name": (f"status --name={'c' * 41}", r"41 letters.*40"),
    "bad namespace": ("status --name=clip --namespace=-o", r"'-o'.*Kubernetes"),
    "no env file": ("stop --env=none.env", r"none\.env.*GKE_NAME"),
    "no type": (run(""), r"--type=v5litepod-256.*a3-highgpu-8g"),
    "no image": (f"run --name=clip --type=v6e-8 {MAIN}", r"--image=.*GKE_IMAGE.*gke\.sh build"),
    "bad image": (f"run --name=clip --image=A!b --type=v6e-8 {MAIN}", r"'A!b'.*--image="),
    "unknown type": (run("--type=h100-8"), r"'h100-8'.*tpu7x-N.*a3-highgpu"),
    "a nickname": (run("--type=v5e-16"), r"v5e-16.*--type=v5litepod-16"),
    "a word for a size": (run("--type=v6e-big"), r"v6e-big.*number"),
    "no such size": (
        run("--type=v5litepod-100"),
        r"100 chips.*v5litepod-64 \(8x8\) and v5litepod-128 \(8x16\)",
    ),
    "half a chip": (run("--type=tpu7x-7"), r"TensorCores.*tpu7x-8"),
    "no such topology": (
        run("--type=v5litepod-16 --topology=7x3"),
        r"7x3.*8x16 and 16x16; for v5litepod-16 it is 4x4",
    ),
    "no topology": (run("--type=v6e-16 --topology=big"), r"big.*4x4"),
    "a topology of zeros": (run("--type=v6e-16 --topology=08x0"), r"08x0.*4x4"),
    "flat for a cube": (run("--type=tpu7x --topology=8x8"), r"8x8.*2x2x1.*4x4x4"),
    "a cube out of order": (run("--type=v5p-256 --topology=8x4x4"), r"smallest first.*it is 4x4x8"),
    "too large": (run("--type=v4-9000"), r"4500 chips.*v4-8192"),
    "another size": (run("--type=tpu7x-64 --topology=4x4x4"), r"32 chips.*64.*tpu7x-128.*2x4x4"),
    "too many hosts": (run("--type=v5litepod-16 --hosts=3"), r"--hosts is 3.*4 host"),
    "slices of GPUs": (run("--type=a3-highgpu-8g --slices=2"), r"--hosts=2"),
    "topology of GPUs": (run("--type=a3-highgpu-8g --topology=2x2"), r"--topology is 2x2"),
    "no slices": (run("--type=v6e-8 --slices=0"), r"--slices.*at least 1"),
    "bad number": (run("--type=v6e-8 --max-restarts=-1"), r"max-restarts.*'-1'"),
    "bad label": (run("--type=v6e-8 --node-selector=pool"), r"--node-selector.*LABEL=VALUE"),
    "no config": (f"run {HERE} --type=v6e-8 -- --workdir=gs://bucket/run", r"--config"),
    "no such config": (
        f"run {HERE} --type=v6e-8 -- --config=b33",
        r"b33.*quickstart.py vit_b32.py",
    ),
    "local workdir": (
        f"run {HERE} --type=v6e-8 -- --config=vit_b32 --workdir=runs/x",
        r"runs/x.*gs://",
    ),
    "line break": (["run", *HERE.split(), "--type=v6e-8", *MAIN.split(), "a\nb"], r"line break"),
    "no such ref": (run("--type=v6e-8 --ref=v99"), r"'v99'.*--ref"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_paragraph(name, cluster):
    arguments, wanted = MISTAKES[name]
    answer = cluster.launch(arguments)
    assert answer.returncode == ExitCode.USER_ERROR
    said = fake_cloud.one_paragraph(answer.stderr)
    assert re.search(wanted, said), said
    assert cluster.calls() == []


def test_one_file_of_settings(cluster):
    """The lines of all launchers stand in one file, and the command line wins."""
    text = "TPU_NAME=other\nPROJECT=p\nGKE_NAME=clip\nGKE_TYPE=v6e-64\nGKE_SLICES=2\n"
    file = cluster.folder / "all.env"
    file.write_text(f"{text}GKE_IMAGE={IMAGE}\nKUEUE_QUEUE=lq\nGKE_NAMESPACE=team\n")
    made = yaml.safe_load(cluster.ready(f"run --dry-run --env={file} --slices=3 {MAIN}").stdout)
    assert made["metadata"]["name"] == "clip"
    assert made["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "lq"}
    assert made["spec"]["replicatedJobs"][0]["replicas"] == 3
    assert cluster.ready(f"stop --dry-run --env={file}").stdout == (
        "kubectl --namespace=team delete jobset clip --cascade=foreground --wait\n"
    )


def test_build_sends_what_is_committed(cluster):
    docker = (
        '#!/bin/sh\necho "$*" >>"$CLUSTER/docker"\n[ "$1" = push ] || tar -t >"$CLUSTER/files"\n'
    )
    fake_cloud.executable(cluster.folder / "bin/docker", docker)
    stray = cluster.repository / "stray.py"
    stray.touch()
    try:
        done = cluster.ready(f"build --name=clip --type=a3-highgpu-8g --image={IMAGE}")
    finally:
        stray.unlink()
    assert "Warning: 1 changed or new file(s)" in done.stderr
    head = fake_cloud.git(cluster.repository, "rev-parse", "HEAD").strip()
    build, push = (cluster.folder / "docker").read_text().splitlines()
    assert f"--tag={IMAGE}:{head[:12]} --build-arg=JAX=cuda13 --build-arg=COMMIT={head}" in build
    assert push == f"push {IMAGE}:{head[:12]}"
    files = (cluster.folder / "files").read_text().split()
    assert "main.py" in files
    assert "launch/Dockerfile" in files
    assert "stray.py" not in files


def test_container_file():
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    hadolint = shutil.which("hadolint", path=path)
    assert hadolint, "hadolint is missing: pip install -r requirements-dev.txt"
    file = ROOT / "launch" / "Dockerfile"
    found = subprocess.run([hadolint, file], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    root = file.read_text().replace("USER 1000", "USER root")  # so a finding is told
    found = subprocess.run([hadolint, "-"], input=root, capture_output=True, text=True)
    assert "DL3002" in found.stdout


def test_container_has_the_files_that_training_needs(tmp_path):
    for sources in re.findall(r"^COPY (.*) \S+$", (ROOT / "launch/Dockerfile").read_text(), re.M):
        for source in sources.split():
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, tmp_path / source, symlinks=True)
            else:
                shutil.copy(ROOT / source, tmp_path)
    command = [
        sys.executable,
        "main.py",
        "--config=configs/vit_b32.py",
        f"--workdir={tmp_path}/run",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == ExitCode.USER_ERROR, done.stderr
    assert "data.source.path" in done.stderr
