"""The command line's answers to mistakes: one paragraph, no traceback, and an exit status."""

import importlib
import pathlib
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from clip_jax.common import config_file
from clip_jax.configs import default, vit_b32
from clip_jax.errors import UserError
from clip_jax.training import cli, validation

ROOT = pathlib.Path(__file__).parents[1]
SMOKE = "--config=configs/vit_b32.py:smoke"

# Arguments, and what the answer must name.
MISTAKES = {
    "nothing": ([], r"--config is missing, as in .*--config=vit_b32:smoke"),
    "nothing behind": (["--config="], r"--config is missing"),
    "no such file": (["--config=configs/vit_b33.py"], r"vit_b33.*mean --config=vit_b32\?"),
    "no such name": (["--config=quikstart"], r"quikstart.*mean --config=quickstart\?"),
    "no Python file": (["--config=README.md"], r"no config README\.md.*ends in \.py"),
    "no such argument": (["--config=configs/vit_b32.py:smok"], r"'smok'.*smoke"),
    "no such field": ([SMOKE, "--config.batchsize=3"], r"batchsize.*mean --config\.batch_size\?"),
    "no such field below": (
        [SMOKE, "--config.optim.learningrate=3"],
        r"learningrate.*mean --config\.optim\.learning_rate\?",
    ),
    "field of a part": ([SMOKE, "--config.warmup=3"], r"mean --config\.optim\.warmup\?"),
    "field in another part": (
        [SMOKE, "--config.model.learning_rate=3"],
        r"mean --config\.optim\.learning_rate\?",
    ),
    "no config. before it": (
        [SMOKE, "--batch_size=3"],
        r"no flag --batch_size.*config\.batch_size",
    ),
    "old name": (
        [SMOKE, "--config.data.patience=3"],
        r"data\.patience is now .*data\.stall_timeout",
    ),
    "bad type": ([SMOKE, "--config.batch_size=many"], r"batch_size.*many"),
    "bad type of a tuple": ([SMOKE, "--config.model.size.image_layers=two"], r"image_layers.*two"),
    "no such flag": ([SMOKE, "--wrkdir=x"], r"wrkdir.*mean --workdir\?"),
    "stray word": ([SMOKE, "batch_size=3"], r"batch_size=3.*--config\.NAME=VALUE"),
    "bad choice": ([SMOKE, "--config.data.crop=middle"], r"data\.crop.*'middle'.*random"),
    "too small": ([SMOKE, "--config.batch_size=0"], r"batch_size is 0.*at least 1"),
    "no data": (["--config=configs/vit_b32.py"], r"no training data.*vit_b32\.py:smoke"),
    "bad size": ([SMOKE, "--config.model.size.text_heads=0"], r"text_heads.*0"),
    "no room": ([SMOKE, "--config.model.size.context_length=1"], r"context_length.*1"),
    "unwritable": ([SMOKE, "--workdir=/proc/run"], r"workdir /proc/run cannot be written"),
    "no coordinator": ([SMOKE, "--processes=2"], r"--processes.*need --coordinator"),
    "no number of hosts": (
        [SMOKE, "--coordinator=127.0.0.1:1234"],
        r"needs --processes.*--process",
    ),
    "one number": (
        [SMOKE, "--config.data.crop_scale=(0.5,)"],
        r"crop_scale is \(0\.5,\).*least and the greatest",
    ),
    "no confidence": (
        [SMOKE, "--config.eval.confidence=99.0"],
        r"eval\.confidence is 99\.0.*between",
    ),
    "cut short": ([SMOKE, "--config.batch=3"], r"no setting batch\..*--config\.batch_size"),
    "no such model": ([SMOKE, "--config.model.name=ViT-B/33"], r"'ViT-B/33'.*ViT-B/32"),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, subprocess.CompletedProcess]:
    """The answers to all mistakes and to --help, computed two at a time."""
    folder = tmp_path_factory.mktemp("main")
    questions = {name: arguments for name, (arguments, _) in MISTAKES.items()}
    questions["help"] = ["--help"]

    def ask(name: str) -> subprocess.CompletedProcess:
        workdir = folder / name
        command = [sys.executable, str(ROOT / "main.py"), f"--workdir={workdir}"]
        answer = subprocess.run(
            [*command, *questions[name]], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        answer.workdir = workdir
        return answer

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(questions, pool.map(ask, questions)))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_paragraph(name, answers):
    answer, wanted = answers[name], MISTAKES[name][1]
    said = answer.stderr.strip()
    assert answer.returncode != 0
    assert not answer.workdir.exists()
    assert "Traceback" not in answer.stdout + said
    assert answer.stdout == ""
    assert "\n" not in said
    assert 30 < len(said) < 700
    assert said[0].isupper()
    assert said.endswith(".")
    assert "UserError" not in said
    assert re.search(wanted, said), said


def test_help(answers):
    answer = answers["help"]
    assert answer.returncode == 0
    assert "Traceback" not in answer.stdout + answer.stderr
    for name in ("--config", "--workdir", "--coordinator"):
        assert re.search(rf"^ +{name}$", answer.stdout, re.MULTILINE)
    assert f"python {ROOT / 'main.py'} --config=configs/vit_b32.py" in answer.stdout
    assert re.search(r"^Configs: .*vit_b32,", answer.stdout, re.MULTILINE | re.DOTALL)


def test_the_default_workdir():
    assert cli.default_workdir("configs/vit_b32.py:smoke") == "runs/vit_b32-smoke"
    assert cli.default_workdir("vit_b32:smoke") == "runs/vit_b32-smoke"
    assert cli.default_workdir("vit_b32") == "runs/vit_b32"
    assert cli.default_workdir("/elsewhere/mine.py") == "runs/mine"


# ---- Where a config comes from -----------------------------------------------------------------

OWN = """
from clip_jax.configs import default

def get_config():
    config = default.get_config()
    {}
    return config
"""


def parse(*arguments: str) -> config_file.CommandLine:
    return config_file.parse(arguments, "train", lambda values: None)


@pytest.mark.parametrize("name", ["rn50", "rn50.py", "configs/rn50", "configs/rn50.py"])
def test_the_configs_that_come_along_are_found_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in ([f"--config={name}:smoke"], ["--config", f"{name}:smoke"]):
        given = parse("--config.batch_size=5", *arguments, "--config.model.size.image_layers=(2,3)")
        assert given.name == f"{name}:smoke"
        assert given.config.model.name == "RN50"
        assert given.config.batch_size == 5
        assert given.config.model.size.image_layers == (2, 3)
        assert given.config.duration == "20 steps"


def test_the_file_of_a_path_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rn50.py").write_text(OWN.format("config.seed = 7"))
    assert parse("--config=rn50.py").config.seed == 7
    assert parse("--config=./rn50.py").config.seed == 7
    assert parse(f"--config={tmp_path}/rn50.py").config.seed == 7
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("--config=~/rn50.py").config.seed == 7
    assert parse("--config=rn50").config.seed == 0


# A line of a config of one's own, and what the answer must name.
WRONG = {
    "old name": ("config.optim.half_weights = 'x'", r"mine\.py, line 6: .*optim\.bf16_params"),
    "old part": ("config.model.pack.length = 80", r"line 6: .*model\.packing\.length"),
    "typo": ("config.batchsize = 4", r"line 6.*batchsize"),
    "typo below": ("config.optim.learning_rat = 4", r"line 6.*learning_rat"),
    "bad type": ("config.batch_size = 'many'", r"line 6.*many"),
    "not Python": ("config.batch_size = ", r"mine\.py.*invalid syntax"),
    "unknown name": ("config.batch_size = many", r"line 6.*many"),
    "configs": ("import configs", r"line 6.*from clip_jax\.configs import default"),
    "own error": ("default.finish(config, 'smok')", r"^Unknown config argument 'smok'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_in_a_config(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(ROOT)])
    monkeypatch.delitem(sys.modules, "configs", raising=False)
    line, wanted = WRONG[name]
    (tmp_path / "mine.py").write_text(OWN.format(line))
    with pytest.raises(UserError) as caught:
        parse(f"--config={tmp_path}/mine.py")
    assert re.search(wanted, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


def test_every_old_name_has_a_new_one():
    known = set(config_file._names(default.get_config()))
    assert len(default.RENAMED) >= 6
    for old, new in default.RENAMED.items():
        assert old not in known
        assert new in known
        with pytest.raises(UserError, match=rf"{re.escape(old)} is now called {re.escape(new)}\."):
            parse("--config=vit_b32", f"--config.{old}=1")


def test_every_config_can_be_read():
    names = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__", "default"}
    assert len(names) >= 9
    for name in names:
        module = importlib.import_module(f"clip_jax.configs.{name}")
        assert set(module.get_config().keys()) == set(default.get_config().keys())
        validation.validate(module.get_config("smoke"))
        with pytest.raises(UserError, match="smoke"):
            module.get_config("smok")


def test_validate_names_every_problem_at_once():
    config = vit_b32.get_config("smoke")
    validation.validate(config)
    config.seed = -1
    config.model.dtype = "float64"
    with pytest.raises(UserError) as caught:
        validation.validate(config)
    assert re.search(r"seed is -1.*at least 0", str(caught.value))
    assert re.search(r"model\.dtype is 'float64'.*bfloat16", str(caught.value), re.IGNORECASE)


def test_the_first_warning_stands_alone():
    """Not behind a line of absl, whose flags are not those of the command line here."""
    code = """
from absl import logging
from clip_jax.training import cli
cli._run = lambda *_: logging.warning("a disk is full")
cli.main(["--config=vit_b32:smoke"])
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    (line,) = ran.stderr.splitlines()
    assert line.endswith("] a disk is full")
