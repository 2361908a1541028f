"""The package as a stranger gets it: a wheel, in a folder of its own, without TensorFlow."""

import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
import xla_flags

import clip_jax

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Python runs a module of this name at its start.
WITHOUT_TENSORFLOW = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0].startswith("tensorflow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""

OWN = """
from clip_jax.configs import default, vit_b32

def get_config(argument=""):
    config = vit_b32.get_config("smoke")
    config.duration = argument
    return config
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> pathlib.Path:
    """The folder that the wheel is installed in; built from a copy, which leaves nothing here."""
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("needs setuptools 77")
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in names.split("\0"):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--no-input", "install", "--quiet", "--no-deps"]
    where = ["--no-build-isolation", "--no-compile", f"--target={folder}", str(source)]
    subprocess.run([*pip, *where], check=True)
    return folder


@pytest.fixture(scope="module")
def nowhere(tmp_path_factory) -> pathlib.Path:
    """An empty folder to start from."""
    return tmp_path_factory.mktemp("nowhere")


def run(
    installed: pathlib.Path, folder: pathlib.Path, *command: str, tensorflow: bool = False
) -> subprocess.CompletedProcess:
    """Runs Python with nothing of the clone in its path."""
    path = [str(installed)]
    if not tensorflow:
        blocker = folder / "blocker"
        blocker.mkdir(exist_ok=True)
        (blocker / "sitecustomize.py").write_text(WITHOUT_TENSORFLOW)
        path.insert(0, str(blocker))
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=xla_flags.environment(1) | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_it_is_that_of_the_wheel(installed, nowhere):
    program = "import clip_jax, clip_jax.configs.default as d; print(clip_jax.__file__, d.__file__)"
    shown = run(installed, nowhere, "-c", program).stdout.split()
    assert shown == [
        str(installed / "clip_jax/__init__.py"),
        str(installed / "clip_jax/configs/default.py"),
    ]
    top = {path.name for path in installed.iterdir()} - {"bin"}
    assert {name for name in top if not name.endswith(".dist-info")} == {"clip_jax"}


def test_every_file_of_the_package_is_in_the_wheel(installed):
    def files(folder: pathlib.Path) -> set[str]:
        found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        return {name for name in found if "__pycache__" not in name}

    expected = files(ROOT / "clip_jax") | {f"configs/{n}" for n in files(ROOT / "configs")}
    # Of the texts for readers, only one is read by the program too.
    texts = {name for name in expected if name.endswith(".md")} - {"evaluate/sets/README.md"}
    assert files(installed / "clip_jax") == expected - texts


def test_the_console_script(installed, nowhere):
    shown = run(installed, nowhere, str(installed / "bin/clip-jax"), "train", "--help")
    assert shown.returncode == 0, shown.stderr
    assert "Configs: clipa," in shown.stdout.replace("\n", " ")
    assert str(installed / "clip_jax/configs/default.py") in shown.stdout


@pytest.mark.slow
def test_all_of_it_without_tensorflow(installed, nowhere):
    """Every module and command, training, evaluation, embedding, export."""
    done = run(installed, nowhere, str(ROOT / "tests/support/smoke.py"))
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d{3} modules, \d\d commands, a run and its use\.$", done.stdout.strip())


def test_a_run_imports_no_tensorflow_where_it_is_installed(installed, nowhere):
    """The config is the user's own; TensorFlow would cost seconds and a gigabyte."""
    pytest.importorskip("tensorflow")
    (nowhere / "mine.py").write_text(OWN)
    program = (
        "import sys; from clip_jax import __main__; __main__.main(); "
        "assert not {'tensorflow', 'tensorflow_datasets'} & set(sys.modules)"
    )
    command = ["-c", program, "train", "--config=mine.py:2 steps", "--workdir=~/mine"]
    command += [f"--config.eval.{name}.source.type=" for name in ("zeroshot", "retrieval")]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=nowhere,
        env=xla_flags.environment(1) | {"PYTHONPATH": str(installed), "HOME": str(nowhere)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((nowhere / "mine/config.json").read_text())["duration"] == "2 steps"
    assert list((nowhere / "mine/tensorboard").glob("events*"))


@pytest.mark.parametrize(
    ("source", "package"), [("tfds:mnist", "tensorflow-datasets"), ("x.tfrecord", "tensorflow")]
)
def test_what_needs_tensorflow_says_so(source, package, installed, nowhere):
    (nowhere / "x.tfrecord").write_bytes(b"")
    done = run(installed, nowhere, "-m", "clip_jax", "data", "stats", source)
    assert done.returncode == 2
    assert f"needs the package {package}, which is not installed" in done.stderr
    assert "Traceback" not in done.stderr


# ---- What stands in several files --------------------------------------------------------------


def lines(name: str) -> list[str]:
    """The requirements in a file, without comments and other files."""
    found = (line.partition("  #")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in found if line and not line.startswith(("#", "-r"))]


def test_requirements_agree():
    assert PROJECT["optional-dependencies"]["tensorflow"] == lines("requirements.txt")
    for file in ROOT.glob("requirements-*.txt"):
        if file.name != "requirements-core.txt":
            assert "-r requirements.txt\n" in file.read_text(), file.name


def test_versions_agree():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {clip_jax.__version__}\n" in citation
    assert f"\n## {clip_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()
