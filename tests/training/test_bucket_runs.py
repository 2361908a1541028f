"""Whole runs with shards and workdir in a bucket: killed, resumed, on several hosts, at fault."""

import json
import pathlib
import re
import subprocess
import sys
import time

import pytest
import tiny_data
import tiny_run
import xla_flags
from etils import epath
from several_hosts import free_port, launch, outputs
from shards import write_tar
from test_checkpoint import META, abstract, assert_same, make_state, save
from test_distributed import TOLERANCE

import clip_jax
from clip_jax.checkpoint import Checkpoints, writes
from clip_jax.configs import default, vit_b32
from clip_jax.errors import ExitCode, StorageError
from clip_jax.storage import faults
from clip_jax.training import train

ROOT = pathlib.Path(__file__).parents[2]
SHARDS, EACH = 4, 20
SETTINGS = {
    **tiny_run.SETTINGS,
    "checkpoint.every": "3 steps",
    "data.source.type": "tar",
    "log.tensorboard": True,
}
KEPT = [6, 9, 12]  # the checkpoints that remain of such a run: the best and the last two
# Processes of their own compile what they run.
UNEVALUATED = {"config.eval.zeroshot.source.type": "", "config.eval.retrieval.source.type": ""}
# Whatever is measured in seconds differs between two runs.
TIMED = ("train/images_per_second", "data/waiting", "storage/failures", "time/", "host/")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        members = []
        for i in range(shard * EACH, (shard + 1) * EACH):
            image = tiny_data.encoded(tiny_data.picture(i))
            members += tiny_data.sample(f"{i:03}", image, f"caption number {i}")
        write_tar(folder / f"{shard}.tar", members)
    return folder


@pytest.fixture(scope="module")
def local(shards, tmp_path_factory) -> dict:
    """The metrics of an uninterrupted run on disk."""
    workdir = tmp_path_factory.mktemp("local")
    with tiny_run.compile_once():
        train.train(config(shards), workdir)
    return metrics((workdir / "metrics.jsonl").read_bytes())


@pytest.fixture
def place(bucket, shards) -> str:
    """A prefix of the bucket with the shards in it, not indexed."""
    prefix = f"runs-{time.monotonic_ns()}"
    for path in sorted(shards.iterdir()):
        if path.suffix == ".tar":
            bucket.put("bucket", f"{prefix}/shards/{path.name}", path.read_bytes())
    return prefix


def config(folder, **changes):
    made = vit_b32.get_config("smoke")
    made.update_from_flattened_dict({**SETTINGS, "data.source.path": f"{folder}/*.tar", **changes})
    return made


def command(place: str, **flags) -> list[str]:
    settings = {**SETTINGS, "data.source.path": f"gs://bucket/{place}/shards/*.tar"}
    flags = {**{f"config.{k}": v for k, v in settings.items()}, **flags}
    return [
        "main.py",
        "--config=configs/vit_b32.py:smoke",
        f"--workdir=gs://bucket/{place}/run",
        *(f"--{name}={value}" for name, value in flags.items()),
    ]


def metrics(data: bytes) -> dict[int, dict[str, float]]:
    """All that does not depend on time, by step."""
    found: dict[int, dict[str, float]] = {}
    for row in map(json.loads, data.splitlines()):
        kept = {name: value for name, value in row.items() if not name.startswith(TIMED)}
        found.setdefault(int(row["step"]), {}).update(kept)
    return found


def steps(bucket, place: str) -> list[int]:
    """Returns the steps of the complete checkpoints."""
    names = bucket.names("bucket", f"{place}/run/checkpoints/")
    return sorted(int(m[1]) for n in names if (m := re.search(r"/(\d+)/commit_success.txt$", n)))


def test_from_bucket_to_bucket(bucket, place, local, capsys):
    workdir = f"gs://bucket/{place}/run"
    with tiny_run.compile_once():
        final = train.train(config(f"gs://bucket/{place}/shards"), workdir)
    assert metrics(bucket.get("bucket", f"{place}/run/metrics.jsonl")) == local
    assert steps(bucket, place) == KEPT
    assert f"Report: {workdir}/report.html" in capsys.readouterr().out
    names = bucket.names("bucket", f"{place}/run/")
    for name in ("config.json", "report.html", "tensorboard/events"):
        assert any(f"/run/{name}" in each for each in names), name
    uploads = [r for r in bucket.requests() if r["method"] == "POST" and "metrics.jsonl" in str(r)]
    assert len(uploads) <= 6  # at each checkpoint and at the end, not for each row
    model = clip_jax.load(workdir)
    assert model.encode_text(["a caption"]).shape == (1, 16)
    assert (
        final["retrieval/image_to_text/recall@1"] == local[12]["retrieval/image_to_text/recall@1"]
    )


def test_killed_and_resumed(bucket, place, shards, tmp_path, capsys):
    """Bit-identical, as locally."""
    longer = {"duration": "40 steps", "eval.every": "40 steps", "checkpoint.every": "10 steps"}
    with tiny_run.compile_once():
        train.train(config(shards, **longer), tmp_path)
    wanted = metrics((tmp_path / "metrics.jsonl").read_bytes())
    flags = {f"config.{name}": value for name, value in longer.items()}
    process = launch(command(place, **flags, **UNEVALUATED), devices=8)
    try:
        deadline = time.monotonic() + 200
        while not steps(bucket, place):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.communicate()
    assert steps(bucket, place)[-1] < 40
    capsys.readouterr()
    with tiny_run.compile_once():
        workdir = f"gs://bucket/{place}/run"
        train.train(config(f"gs://bucket/{place}/shards", **longer), workdir)
    assert re.search(rf"Resuming {workdir} from step \d+", capsys.readouterr().out)
    assert metrics(bucket.get("bucket", f"{place}/run/metrics.jsonl")) == wanted


@pytest.mark.slow
def test_two_processes_with_one_workdir(bucket, place, shards, tmp_path, capsys):
    """Then a single process resumes their run."""
    short = {"duration": "6 steps", "eval.every": "6 steps"}
    with tiny_run.compile_once():
        train.train(config(shards, **short), tmp_path)
    wanted = metrics((tmp_path / "metrics.jsonl").read_bytes())
    shared = {"coordinator": f"127.0.0.1:{free_port()}", "processes": 2, **UNEVALUATED}
    shared |= {f"config.{name}": value for name, value in short.items()}
    commands = [command(place, process=i, **shared) for i in range(2)]
    first, _ = outputs([launch(arguments, devices=4) for arguments in commands])
    assert "on 8 x cpu (mesh data 8)" in first
    assert_same_losses(bucket, place, wanted)
    # One host has indexed, the other has read what it found.
    whole = len(bucket.get("bucket", f"{place}/shards/0.tar"))
    reads = [r for r in bucket.requests() if "/0.tar" in r["path"] and r["sent"] == whole]
    assert len(reads) == 1
    assert steps(bucket, place) == [3, 6]
    for name in bucket.names("bucket", f"{place}/run/checkpoints/6/"):
        bucket.delete("bucket", name)
    capsys.readouterr()
    with tiny_run.compile_once():
        train.train(config(f"gs://bucket/{place}/shards", **short), f"gs://bucket/{place}/run")
    assert "from step 3." in capsys.readouterr().out
    assert_same_losses(bucket, place, wanted)


@pytest.mark.slow
def test_what_one_host_cannot_save_is_tried_again_by_all(bucket, place):
    """Else all would wait ten minutes for each other."""
    fault = {"match": "POST .*upload.*checkpoints/3/model", "kind": 403, "count": 1}
    bucket.faults([fault])
    shared = {"coordinator": f"127.0.0.1:{free_port()}", "processes": 2, **UNEVALUATED}
    first, _ = outputs([launch(command(place, process=i, **shared), devices=4) for i in range(2)])
    said = "A checkpoint could not be written to .*lack the right.*Training goes on"
    assert re.search(said, first)
    assert steps(bucket, place)[-1] == KEPT[-1]


def assert_same_losses(bucket, place: str, wanted: dict) -> None:
    found = metrics(bucket.get("bucket", f"{place}/run/metrics.jsonl"))
    assert list(found) == list(wanted)
    for step, row in wanted.items():
        loss = found[step]["train/loss"]
        assert loss == pytest.approx(row["train/loss"], rel=TOLERANCE), step


def test_a_run_in_a_storm(bucket, place, local, capsys):
    """Every kind of failure, and checkpoints that cannot be written for a while."""
    read, write = "GET .*tar", "(POST|PUT) .*upload"
    bucket.faults(
        [
            {"match": f"{write}.*checkpoints/3", "kind": 503, "count": 2},
            *({"match": read, "kind": kind, "p": 0.05} for kind in (503, 429, "reset", "truncate")),
            *({"match": write, "kind": kind, "p": 0.02} for kind in (503, 429, "reset")),
        ]
    )
    with tiny_run.compile_once():
        train.train(config(f"gs://bucket/{place}/shards"), f"gs://bucket/{place}/run")
    bucket.faults([])
    assert metrics(bucket.get("bucket", f"{place}/run/metrics.jsonl")) == local
    assert steps(bucket, place) == KEPT
    assert "Storage failed now and then, and was asked again: " in capsys.readouterr().out
    assert faults.counts()["HTTP 503"] >= 2


@pytest.mark.parametrize("step", [3, 12])
def test_a_checkpoint_that_failed_is_tried_again(bucket, place, local, caplog, step):
    """The last one too, and what is left of it is never taken for whole."""
    fault = {"match": f"POST .*upload.*checkpoints/{step}/", "kind": 403, "count": 1}
    bucket.faults([fault])
    with tiny_run.compile_once():
        train.train(config(f"gs://bucket/{place}/shards"), f"gs://bucket/{place}/run")
    assert "HTTP 403 while saving" in caplog.text
    assert metrics(bucket.get("bucket", f"{place}/run/metrics.jsonl")) == local
    assert steps(bucket, place)[-1] == 12


def test_the_limit_counts_from_the_first_failure_since_a_success(bucket, monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(writes.time, "monotonic", lambda: now[0])
    limit = 3600.0
    saves = writes.Writes(
        epath.Path("gs://bucket/run"), limit, lambda step, text: said.append((step, text))
    )
    error = ValueError("[http_response_code='503']")
    for start in (1.0, 1e4):
        now[0] = start
        saves.failed(error)
        assert not saves.retry_due()
        now[0] = start + 500
        assert saves.retry_due()
        saves.begin(1, lambda: False)  # is tried again, and fails again
        saves.failed(error)
        saves.begin(2, lambda: False)
        saves.succeeded()
    now[0] = 2e4
    saves.failed(error)
    now[0] += limit + 1
    saves.begin(3, lambda: False)
    with pytest.raises(StorageError, match="could not be written"):
        saves.failed(error)
    assert [step for step, _ in said] == [0, 2, 2, 2, 2]  # failing, written, twice; failing
    assert all("Training goes on" in text for _, text in said[::2])
    assert all("again, after 8m 20s and 2 failures" in text for _, text in said[1::2])


def test_checkpoints_that_never_succeed(bucket, place):
    """They are not tried again at once, and end the run in a sentence."""
    fault = {"match": "POST .*upload.*checkpoints/", "kind": 403}
    bucket.faults([fault])
    made = config(f"gs://bucket/{place}/shards", **{"checkpoint.give_up_after": 4.0})
    with tiny_run.compile_once(), pytest.raises(StorageError, match=r"could not be written.*right"):
        train.train(made, f"gs://bucket/{place}/run")
    # Tries after 1, 2 and 4 seconds, of a few requests each, until a later one is past the limit.
    tries = [r for r in bucket.requests() if r["status"] == 403]
    assert len(tries) < 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_moved_within_the_bucket(bucket, place):
    """The next save of its step does not meet it, nor what a killed save left."""
    said, workdir = [], f"gs://bucket/{place}/run"
    settings = {"keep": 3, "report": lambda *each: said.append(each)}
    save(workdir, {4: {}, 8: {}}, **settings)
    names = bucket.names("bucket", f"{place}/run/checkpoints/8/")
    bucket.delete("bucket", next(name for name in names if "/model/d/" in name))
    bucket.put("bucket", f"{place}/run/checkpoints/6/model/d/left", b"half")
    with Checkpoints(workdir, **settings) as store:
        assert not bucket.names("bucket", f"{place}/run/checkpoints/6/")
        found = store.restore_latest(abstract((1, 1)))
        assert_same(found.state, make_state())
        assert (found.step, store.steps()) == (4, [4])
        store.save(make_state(), 8, META, {})
        assert store.finish()
    ((_, sentence),) = said
    assert f"moved to gs://bucket/{place}/run/damaged/8;" in sentence
    moved = bucket.names("bucket", f"{place}/run/damaged/8/")
    assert len(moved) == len(names) - 1
    with Checkpoints(workdir, **settings) as store:
        assert store.restore_latest(abstract((1, 1))).step == 8


@pytest.mark.parametrize("what", ["(model|optimizer)", "commit_success"])
def test_a_bucket_that_fails_is_no_damage(bucket, place, monkeypatch, what: str):
    """Nothing is moved, deleted or passed over because the bucket does not tell."""
    monkeypatch.setattr(faults, "RETRY_FOR", 0.1)
    workdir = f"gs://bucket/{place}/run"
    save(workdir, {4: {}, 8: {}}, keep=2)

    def resume() -> int:
        with Checkpoints(workdir, keep=2) as store:
            return store.restore_latest(abstract((1, 1))).step

    monkeypatch.setattr(faults, "_accessed", set())  # as in a new process
    bucket.faults([{"match": f"GET .*checkpoints/8/{what}", "kind": 403}])
    with pytest.raises(StorageError, match=r"checkpoints/8.*lack the right"):
        resume()
    bucket.faults([])
    assert resume() == 8


def test_with_rights_on_objects_alone(bucket, place, local):
    bucket.rights("bucket", "objects")
    with tiny_run.compile_once():
        train.train(config(f"gs://bucket/{place}/shards"), f"gs://bucket/{place}/run")
    assert metrics(bucket.get("bucket", f"{place}/run/metrics.jsonl")) == local
    assert "denied" not in bucket.stats()


# ---- Mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "rights", "message"),
    [
        ({"workdir": "gs://buckett/run"}, "all", r"no such bucket.*'buckett'"),
        (
            {"config.data.source.path": "gs://bucket/typo/*.tar"},
            "all",
            r"No tar shards match.*typo",
        ),
        ({}, "read", r"lack the right"),
        ({"config.data.source.path": "https://host/0.tar"}, "all", r"https:// is not read"),
    ],
    ids=["bucket", "path", "read-only", "scheme"],
)
def test_mistakes_are_sentences(bucket, place, flags, rights, message):
    bucket.rights("bucket", rights)
    found = subprocess.run(
        [sys.executable, *command(place, **flags)],
        cwd=ROOT,
        env=xla_flags.environment(1),
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == ExitCode.USER_ERROR
    assert "Traceback" not in found.stderr, found.stderr
    assert re.search(message, found.stderr.replace("\n", " ")), found.stderr


@pytest.mark.parametrize(
    "name",
    sorted(
        path.stem for path in (ROOT / "configs").glob("*.py") if "gs://BUCKET" in path.read_text()
    ),
)
def test_the_commands_of_the_configs(bucket, place, name):
    """Each opens its data in the bucket as it stands there, shrunk by :smoke."""
    text = (ROOT / "configs" / f"{name}.py").read_text()
    paths = set(re.findall(r"--config\.data\.source\.path='gs://BUCKET/(\S+)'", text))
    assert paths == {"shards/*.tar"}
    module = __import__(f"configs.{name}", fromlist=["get_config"])
    made = module.get_config("smoke")
    made.data.source = default.source(type="tar", path=f"gs://bucket/{place}/shards/*.tar")
    from clip_jax.data import mixture

    source, order = mixture.create(made.data, 16, 0, batch_size=made.batch_size, parts=1)
    assert len(source) == SHARDS * EACH
    assert source[order[0]].text.startswith("caption number ")
