"""Uploading: a real exchange with a hub that runs here, and what is refused before it."""

import os
import pathlib
import re
import subprocess
import sys

import fake_hub
import numpy as np
import pytest

from clip_jax.errors import UserError
from clip_jax.export import push

pytest.importorskip("huggingface_hub")
ROOT = pathlib.Path(__file__).parents[2]
CARD = "---\nlicense: mit\nlibrary_name: clip_jax\n---\n\n# A model\n"


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """One large file, one in a folder, and a card."""
    made = tmp_path / "exported"
    (made / "inner").mkdir(parents=True)
    (made / "README.md").write_text(CARD)
    (made / "inner" / "settings.json").write_text('{"a": 1}\n')
    noise = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8)
    (made / "model.safetensors").write_bytes(noise.tobytes())
    return made


def run(folder: pathlib.Path, address: str, *arguments: str, token: str = fake_hub.TOKEN):
    """The command in a process of its own: huggingface_hub reads its settings at import."""
    settings = {
        "HF_ENDPOINT": address,
        "HF_TOKEN": token,
        "HF_HOME": str(folder.parent / "home"),
        "HF_HUB_DISABLE_XET": "1",  # the protocol of large files that the hub's own servers speak
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-m", "clip_jax", "push", f"--dir={folder}", "--repo=org/name"]
    return subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
    )


def content(folder: pathlib.Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_upload(folder):
    with fake_hub.serve(large=(".safetensors",)) as (address, hub):
        done = run(folder, address, "--private")
        assert done.returncode == 0, done.stderr
        assert f"Uploaded: {address}/org/name" in done.stdout
        assert hub.repos["org/name"]["visibility"] == "private"
        assert hub.commits == 1
        assert hub.files == content(folder)
        assert len(hub.blobs) == 1  # the large one went its own way


def test_refused_by_the_hub(folder):
    with fake_hub.serve(large=()) as (address, hub):
        done = run(folder, address, token="hf_of_someone_else")
        assert done.returncode == 2
        assert "could not be uploaded" in done.stderr
        assert "token" in done.stderr
        assert "Traceback" not in done.stderr
        assert not hub.files
        assert not hub.repos


def test_dry_run_sends_nothing(folder, capsys):
    push.main([f"--dir={folder}", "--repo=org/name", "--private", "--dry_run"])
    told = capsys.readouterr().out
    assert "inner/settings.json" in told
    assert "model.safetensors" in told
    assert "0.10 MiB" in told
    assert "3 files" in told
    assert "org/name" in told
    assert "licence mit" in told
    assert "private" in told


def test_without_a_token(folder, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="hf auth login"):
        push._upload(folder, "org/name", private=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "README.md").unlink(), r"no model card.*clip_jax card"),
        (lambda folder: (folder / "README.md").write_text("# A model\n"), "names no licence"),
        (
            lambda folder: (folder / "README.md").write_text("---\nlicense: [\n---\n"),
            "header.*cannot be read",
        ),
        (lambda folder: folder.rename(folder.parent / "elsewhere"), "is no folder"),
    ],
    ids=["no card", "no licence", "broken header", "no folder"],
)
def test_mistakes(folder, change, message, capsys):
    change(folder)
    with pytest.raises(SystemExit, match="2"):
        push.main([f"--dir={folder}", "--repo=org/name", "--dry_run"])
    found = " ".join(capsys.readouterr().err.split())
    assert re.search(message, found), found


@pytest.mark.parametrize(
    ("directory", "message"),
    [("gs://bucket/exported", "in a bucket: copy it"), ("https://x/y", "https:// is not read")],
)
def test_only_local_folders(directory, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        push.main([f"--dir={directory}", "--repo=org/name", "--dry_run"])
    assert message in capsys.readouterr().err


def test_a_name_that_is_none(folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        push.main([f"--dir={folder}", "--repo=name", "--dry_run"])
    assert "ORG/NAME" in capsys.readouterr().err
