"""Hosts that would train something else each end before the first step, all with one sentence."""

import pathlib
import subprocess

import pytest
import several_hosts
from several_hosts import endings, launch
from shards import sample, write_tar

from clip_jax.errors import ExitCode, UserError


def run(*flags: list[str]) -> list[subprocess.CompletedProcess]:
    """Runs main.py on as many hosts as there are lists of flags of their own."""
    commands = zip(several_hosts.flags(len(flags)), flags)
    smoke = ["main.py", "--config=configs/vit_b32.py:smoke"]
    return endings([launch([*smoke, *shared, *own], devices=1) for shared, own in commands])


def assert_all_say(ended: list[subprocess.CompletedProcess], *parts: str) -> None:
    for each in ended:
        assert each.returncode == ExitCode.USER_ERROR, each.stderr
        assert "Traceback" not in each.stderr
        said = [line for line in each.stderr.splitlines() if line.startswith(("Host", "The host"))]
        for part in parts:
            assert part in said[0]


def test_a_workdir_of_each_host(tmp_path):
    ended = run([f"--workdir={tmp_path / '0'}"], [f"--workdir={tmp_path / '1'}"])
    assert_all_say(ended, "The hosts do not share the workdir", "not seen by host 1", "gs://BUCKET")
    assert [list((tmp_path / name).iterdir()) for name in "01"] == [[], []]


@pytest.mark.slow
def test_data_of_each_host(tmp_path):
    flags = []
    for host, shards in enumerate((3, 2)):
        folder = tmp_path / str(host)
        folder.mkdir()
        for shard in range(shards):
            write_tar(folder / f"{shard}.tar", sample("a", "a caption") + sample("b", "another"))
        source = ["--config.data.source.type=tar", f"--config.data.source.path={folder}"]
        flags.append([*source, "--config.batch_size=2", f"--workdir={tmp_path / 'run'}"])
    ended = run(*flags)
    assert_all_say(
        ended,
        "Host 1 finds other training data than host 0",
        "6 examples on host 0, 4 examples on host 1, 1 only on host 0 (2.tar)",
    )
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_settings_of_each_host(tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    threads = "--config.data.threads=3"  # may differ
    ended = run([workdir, "--config.batch_size=64"], [workdir, threads])
    said = "Host 1 runs with other settings than host 0: batch_size is 32, on host 0 64."
    assert_all_say(ended, said)
    assert not pathlib.Path(tmp_path / "run").exists()


def test_resuming_on_other_data_is_refused(tmp_path, capsys):
    import tiny_run

    from clip_jax import checkpoint
    from clip_jax.configs import default
    from clip_jax.training import train

    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in range(3):
        files = [f for n in range(8) for f in sample(f"{shard}{n}", f"caption {n}", n)]
        write_tar(shards / f"{shard}.tar", files)

    def run(duration: str = "2 steps", allow: bool = False, path: pathlib.Path = shards) -> str:
        changes = {"duration": duration, "batch_size": 8, "eval.every": "0 steps"}
        config = tiny_run.config({**changes, "checkpoint.allow_data_change": allow})
        config.data.source = default.source(type="tar", path=str(path))
        config.eval.zeroshot.source = default.source()
        config.eval.retrieval.source = default.source()
        with tiny_run.compile_once():
            train.train(config, tmp_path / "run")
        return capsys.readouterr().out

    run()
    moved = tmp_path / "moved"
    shards.rename(moved)
    assert "is finished, at step 2" in run(path=moved)
    (moved / "1.tar").unlink()
    message = (
        "source has 24 examples before, 16 examples now, 1 only before .1.tar.*allow_data_change"
    )
    with pytest.raises(UserError, match=message):
        run(path=moved)
    assert "Resuming on other training data" in run(allow=True, path=moved)
    store = checkpoint.Checkpoints(tmp_path / "run")
    with store:
        assert store.read_meta(2)["data"]["source"]["examples"] == 24
