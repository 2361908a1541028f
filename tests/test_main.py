"""What the command line answers to mistakes: one paragraph, no traceback, and an exit status."""

import importlib
import pathlib
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import main
from clip_jax.errors import UserError
from configs import default, vit_b32

ROOT = pathlib.Path(__file__).parents[1]
SMOKE = "--config=configs/vit_b32.py:smoke"

# Arguments, and what the answer must name.
MISTAKES = {
    "nothing": ([], r"--config"),
    "no such file": (["--config=configs/vit_b33.py"], r"vit_b33.*vit_b32"),
    "no such argument": (["--config=configs/vit_b32.py:smok"], r"'smok'.*smoke"),
    "no such field": ([SMOKE, "--config.batchsize=3"], r"batchsize"),
    "no such field below": ([SMOKE, "--config.optim.learningrate=3"], r"learningrate"),
    "bad type": ([SMOKE, "--config.batch_size=many"], r"batch_size.*many"),
    "bad type of a tuple": ([SMOKE, "--config.model.size.image_layers=two"], r"image_layers.*two"),
    "no such flag": ([SMOKE, "--wrkdir=x"], r"wrkdir"),
    "stray word": ([SMOKE, "batch_size=3"], r"batch_size=3.*--config\.NAME=VALUE"),
    "bad choice": ([SMOKE, "--config.data.crop=middle"], r"data\.crop.*'middle'.*random"),
    "too small": ([SMOKE, "--config.batch_size=0"], r"batch_size is 0.*at least 1"),
    "no data": (["--config=configs/vit_b32.py"], r"no training data.*vit_b32\.py:smoke"),
    "bad size": ([SMOKE, "--config.model.size.text_heads=0"], r"text_heads.*0"),
    "no room": ([SMOKE, "--config.model.size.context_length=1"], r"context_length.*1"),
    "unwritable": ([SMOKE, "--workdir=/proc/run"], r"workdir /proc/run cannot be written"),
    "no coordinator": ([SMOKE, "--processes=2"], r"--processes.*need --coordinator"),
    "no such model": ([SMOKE, "--config.model.name=ViT-B/33"], r"'ViT-B/33'.*ViT-B/32"),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, subprocess.CompletedProcess]:
    """To all mistakes, and to --help; asked two at a time."""
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
        assert re.search(rf"^ +{name}:", answer.stdout, re.MULTILINE)
    assert "python main.py --config=configs/vit_b32.py" in answer.stdout


def test_the_default_workdir():
    assert main.default_workdir("configs/vit_b32.py:smoke") == "runs/vit_b32-smoke"
    assert main.default_workdir("/elsewhere/mine.py") == "runs/mine"


def test_every_config_can_be_read():
    names = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__", "default"}
    assert len(names) >= 9
    for name in names:
        module = importlib.import_module(f"configs.{name}")
        assert set(module.get_config().keys()) == set(default.get_config().keys())
        default.validate(module.get_config("smoke"))
        with pytest.raises(UserError, match="smoke"):
            module.get_config("smok")


def test_validate_names_every_problem_at_once():
    config = vit_b32.get_config("smoke")
    default.validate(config)
    config.seed = -1
    config.model.dtype = "float64"
    with pytest.raises(UserError) as caught:
        default.validate(config)
    assert re.search(r"seed is -1.*at least 0", str(caught.value))
    assert re.search(r"model\.dtype is 'float64'.*bfloat16", str(caught.value), re.IGNORECASE)
