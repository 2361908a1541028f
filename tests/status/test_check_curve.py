"""python -m clip_jax check-curve: sound and faulty runs beside the reference.

The curves are those that benchmarks/reference_curves.py trained: the seeds of the reference,
further ones, and runs with a deliberate fault.
"""

import dataclasses
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import html_page
import numpy as np
import pytest
from scipy import stats

from clip_jax.configs import reference as configs
from clip_jax.status import bands, check_curve, reference
from clip_jax.status.reference import Reference
from clip_jax.training import workdir

ROOT = pathlib.Path(__file__).parents[2]
STORED = ROOT / "benchmarks" / "reference_curves.json"
DIGITS = reference.load_all()["digits"]
OTHERS = reference.load_all(STORED)["digits"]
HELD_OUT = [name for name in OTHERS.runs if name.startswith("held-out")]
BFLOAT16 = [name for name in OTHERS.runs if name.startswith("bfloat16")]
# The step at which a fault is to be seen at the latest, and in what.
FAULTS = {
    "half_rate": (300, "train/grad_norm"),
    "no_warmup": (150, ""),
    "half_loss": (50, "train/loss"),
    "shuffled_captions": (50, "train/"),
}


def points(stored: Reference, name: str) -> dict[str, dict[int, float]]:
    """The curves of a stored run."""
    return {m: dict(zip(stored.steps[m], v, strict=True)) for m, v in stored.runs[name].items()}


def curves_of(name: str) -> dict[str, dict[int, float]]:
    return points(OTHERS, name)


SOUND = points(DIGITS, "seed-0")


def config_of(**changed) -> dict:
    """The config of a run of the digits, as config.json has it; `changed`: by dotted name."""
    config = configs.get_config("digits")
    config.update_from_flattened_dict({"seed": 7, **changed})
    return json.loads(json.dumps(config.to_dict()))


def write_run(
    folder: pathlib.Path, curves: dict[str, dict[int, float]], config: dict | None = None
) -> str:
    """Writes the files of a run that are read."""
    steps = sorted({step for curve in curves.values() for step in curve})
    rows = [{"step": s} | {name: c[s] for name, c in curves.items() if s in c} for s in steps]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps(config_of() if config is None else config))
    return str(folder)


def check(capsys, *arguments: str) -> tuple[int, str]:
    """The exit code of the command and all that it says, on one line."""
    with pytest.raises(SystemExit) as ended:
        check_curve.main(list(arguments))
    said = capsys.readouterr()
    return int(ended.value.code), " ".join((said.out + said.err).replace("\xa0", " ").split())


# ---- Sound runs and faults -----------------------------------------------------------------------


def test_the_reference_is_that_of_the_config():
    """Curves of an earlier config would be compared with runs of this one."""
    assert DIGITS.settings == reference.changed_settings(configs.get_config("digits"))
    assert OTHERS.settings == DIGITS.settings
    assert OTHERS.steps == DIGITS.steps
    assert len(DIGITS.runs) == 5
    assert not DIGITS.runs.keys() & OTHERS.runs.keys()


@pytest.mark.parametrize("seed", DIGITS.runs)
def test_each_seed_lies_within_the_band_of_the_others(seed: str):
    others = {name: run for name, run in DIGITS.runs.items() if name != seed}
    known = dataclasses.replace(DIGITS, runs=others)
    assert bands.compare(known, points(DIGITS, seed)).first is None


@pytest.mark.parametrize("name", HELD_OUT + BFLOAT16)
def test_a_sound_run(name: str, tmp_path, capsys):
    code, said = check(capsys, write_run(tmp_path / "run", curves_of(name)))
    assert code == 0
    assert "matches the reference digits: up to its end at step 600, all 7 curves lie" in said


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault(name: str, tmp_path, capsys):
    latest, metric = FAULTS[name]
    verdict = bands.compare(DIGITS, curves_of(name))
    assert verdict.first is not None
    assert verdict.first.first is not None
    assert verdict.first.ends[verdict.first.first] <= latest
    assert verdict.first.metric.startswith(metric)
    code, said = check(capsys, write_run(tmp_path / "run", curves_of(name)))
    assert code == 1
    assert "does not match the reference digits: it leaves the band of 5 seeds first" in said


# ---- The band ------------------------------------------------------------------------------------


def made(rng: np.random.Generator, runs: int, shared: float, shift: float = 0.0) -> dict[str, dict]:
    """Runs whose logarithms and fractions are normal; `shared`: deviation of all that a run has."""
    steps = np.arange(10, 601, 10)
    made = {}
    for i in range(runs):
        loss = 2 - steps / 300 + shift + shared * rng.normal() + 0.1 * rng.normal(size=60)
        top1 = 0.5 + shift + shared * rng.normal() + 0.02 * rng.normal(size=4)
        made[str(i)] = {"train/loss": np.exp(loss).tolist(), "zeroshot/top1": top1.tolist()}
    return made


STEPS = {"train/loss": list(range(10, 601, 10)), "zeroshot/top1": [150, 300, 450, 600]}


@pytest.mark.parametrize("shared", [0.0, 0.05, 1.0])
def test_false_alarms_of_made_runs(shared: float):
    """Sound runs are outside somewhere about as often as the risk says, alike or not."""
    rng, alarms, count = np.random.default_rng(0), 0, 200
    for _ in range(count):
        runs = made(rng, 6, shared)
        ours = {m: dict(zip(STEPS[m], values)) for m, values in runs.pop("5").items()}
        verdict = bands.compare(Reference("made", {}, "", STEPS, runs), ours, risk=0.2)
        alarms += verdict.first is not None
    assert 0.05 < alarms / count < 0.32  # of 200, three deviations about 0.2 are 0.12 and 0.28


def test_a_shift_is_found():
    rng = np.random.default_rng(1)
    known = Reference("made", {}, "", STEPS, made(rng, 5, 0.02))
    (run,) = made(rng, 1, 0.02, shift=0.6).values()
    verdict = bands.compare(known, {m: dict(zip(STEPS[m], run[m])) for m in run})
    assert all(one.outside.all() for one in verdict.metrics)
    assert verdict.first is not None
    assert verdict.first.metric == "train/loss"


def test_the_edges_of_the_band():
    """By the formula of a prediction interval, of a metric that has one window."""
    values = [0.61, 0.64, 0.58, 0.66, 0.6]
    runs = {str(i): {"zeroshot/top1": [value]} for i, value in enumerate(values)}
    known = Reference("made", {}, "", {"zeroshot/top1": [100]}, runs)
    (one,) = bands.compare(known, {"zeroshot/top1": {100: 0.7}}, risk=0.05).metrics
    mean = sum(values) / 5
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 4)
    half = stats.t.ppf(0.975, 4) * deviation * math.sqrt(6 / 5)
    assert one.low == pytest.approx(mean - half)
    assert one.high == pytest.approx(mean + half)
    assert one.distances == pytest.approx((0.7 - mean) / half)


def test_a_loss_that_is_not_finite(tmp_path, capsys):
    curves = {**SOUND, "train/loss": {**SOUND["train/loss"], 330: math.nan}}
    code, said = check(capsys, write_run(tmp_path / "run", curves))
    assert code == 1
    assert "first in steps 310 to 350, in its loss: not finite, where the band is" in said


# ---- What is shown -------------------------------------------------------------------------------


def test_the_text_fits_the_terminal(tmp_path, capsys):
    with pytest.raises(SystemExit):
        check_curve.main([write_run(tmp_path / "run", curves_of("half_loss"))])
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in lines)
    (head,) = [line.split() for line in lines if line.startswith("curve ")]
    (row,) = [line.split() for line in lines if line.startswith("loss ") and "step" in line]
    assert head[:3] == ["curve", "within", "of"]
    assert row[1:5] == ["0", "12", "step", "50"]


def test_the_page(tmp_path, capsys):
    page = tmp_path / "check.html"
    code, said = check(
        capsys, write_run(tmp_path / "run", curves_of("half_loss")), f"--html={page}"
    )
    assert code == 1
    assert str(page) in said
    read = html_page.Page(page.read_text())
    assert not read.unbalanced
    figures = [one for one in read.elements if one["tag"] == "figure"]
    assert len(figures) == len(DIGITS.steps)
    (verdict,) = [one for one in read.elements if one["attrs"].get("id") == "verdict"]
    assert "leaves the band of 5 seeds first in steps 10 to 50" in verdict["text"]


# ---- Bad input -----------------------------------------------------------------------------------


def cut(curves: dict[str, dict[int, float]], last: int) -> dict[str, dict[int, float]]:
    return {m: {s: v for s, v in curve.items() if s <= last} for m, curve in curves.items()}


def test_a_shorter_run(tmp_path, capsys):
    run = write_run(tmp_path / "run", cut(SOUND, 330))
    code, said = check(capsys, run)
    assert code == 1
    assert "matches the reference digits as far as it goes, up to step 300 of 600" in said
    # Its evaluation may be under way.
    curves = cut(SOUND, 300)
    del curves["zeroshot/top1"][300]
    code, said = check(capsys, write_run(tmp_path / "run", curves))
    assert code == 1
    assert "as far as it goes, up to step 300" in said


def test_a_run_of_few_steps(tmp_path, capsys):
    code, said = check(capsys, write_run(tmp_path / "run", cut(SOUND, 40)))
    assert code == 2
    assert "has come to step 40; the first comparison with the reference digits is at" in said
    assert "step 50." in said


def test_another_config(tmp_path, capsys):
    config = config_of(**{"optim.learning_rate": 5e-4, "data.threads": 3})
    run = write_run(tmp_path / "run", curves_of("half_rate"), config)
    code, said = check(capsys, run)
    assert code == 2
    assert "settings differ: optim.learning_rate is 0.0005, there 0.001. Train one" in said
    code, said = check(capsys, run, "--any-config")
    assert code == 1
    assert "leaves the band" in said


def test_another_evaluation(tmp_path, capsys):
    config = config_of(**{"eval.retrieval.max_examples": 100})
    code, said = check(capsys, write_run(tmp_path / "run", SOUND, config))
    assert code == 2
    assert "eval.retrieval.max_examples is 100, there 5000" in said


def test_a_run_of_something_else(tmp_path, capsys):
    config = json.loads(json.dumps(configs.get_config("digits,smoke").to_dict()))
    code, said = check(capsys, write_run(tmp_path / "run", SOUND, config))
    assert code == 2
    assert "is no run of the reference digits, since settings differ: batch_size is 32" in said
    assert "others. Train one by python main.py --config=configs/reference.py:digits" in said


@pytest.mark.parametrize("arguments", [[], ["--reference=cc3m"]])
def test_a_reference_that_was_not_run(arguments: list[str], tmp_path, capsys):
    config = json.loads(json.dumps(configs.get_config("cc3m").to_dict()))
    run = write_run(tmp_path / "run", SOUND, config)
    code, said = check(capsys, run, *arguments)
    assert code == 2
    assert "The reference cc3m has not been run yet" in said
    assert "Those that have been: digits." in said

    """A config that names no data leaves their place open."""
    """Where a config names none."""
    config = configs.get_config("cc3m")
    config.update_from_flattened_dict({"data.source.type": "tar", "data.source.path": "x"})
    config.seed = 3
    assert check_curve.differences(workdir.flatten(workdir.to_plain(config)), None, "cc3m") == []
    config.optim.b2 = 0.9
    ((name, *_),) = check_curve.differences(workdir.flatten(workdir.to_plain(config)), None, "cc3m")
    assert name == "optim.b2"


def test_what_was_not_run_is_marked():
    text = configs.__doc__ or ""
    for line in configs.LINES:
        (told,) = [one for one in text.splitlines() if one.startswith(f"    {line} ")]
        assert told.endswith("stored" if line in reference.load_all() else "not yet run")


def test_no_such_reference(tmp_path, capsys):
    run = write_run(tmp_path / "run", SOUND)
    code, said = check(capsys, run, "--reference=digit")
    assert code == 2
    assert "There is no reference 'digit': choose one of digits, coco, cc3m" in said


def test_missing_metrics(tmp_path, capsys):
    curves = {metric: curve for metric, curve in SOUND.items() if "norm/text" not in metric}
    code, said = check(capsys, write_run(tmp_path / "run", curves))
    assert code == 2
    assert "has no train/grad_norm/text" in said


def test_rarer_rows(tmp_path, capsys):
    curves = {m: {s: v for s, v in curve.items() if s % 50 == 0} for m, curve in SOUND.items()}
    code, said = check(capsys, write_run(tmp_path / "run", curves))
    assert code == 2
    assert "has no train/loss at step 10, 20, 30 and" in said
    assert "--config.log.every" in said


def test_no_workdir(tmp_path, capsys):
    code, said = check(capsys, str(tmp_path / "nothing"))
    assert code == 2
    assert "is no directory" in said
    (tmp_path / "empty").mkdir()
    code, said = check(capsys, str(tmp_path / "empty"))
    assert code == 2
    assert "holds no run" in said


def test_a_damaged_config(tmp_path, capsys):
    run = write_run(tmp_path / "run", SOUND)
    (tmp_path / "run" / "config.json").write_text("{")
    code, said = check(capsys, run)
    assert code == 2
    assert "no config.json that can be read" in said
    assert check(capsys, run, "--any-config", "--reference=digits")[0] == 0


# ---- Real training -------------------------------------------------------------------------------


def train_to(folder: pathlib.Path, name: str, step: int) -> None:
    """Trains a run of benchmarks/reference_curves.py up to a logged step, and stops it."""
    command = [sys.executable, str(ROOT / "benchmarks" / "reference_curves.py"), f"--child={name}"]
    command += ["--config=reference:digits", f"--workdir={folder}", "--config.seed=77"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    rows = folder / "metrics.jsonl"
    while process.poll() is None and not (rows.exists() and f'"step": {step},' in rows.read_text()):
        time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["seed-0", "half_loss"])
def test_trained_here(name: str, tmp_path, capsys):
    train_to(tmp_path, name, 100)
    code, said = check(capsys, str(tmp_path), "--any-config")
    assert code == 1
    if name == "seed-0":
        assert "as far as it goes, up to step 100" in said
    else:
        assert "leaves the band of 5 seeds first in steps 10 to 50" in said
