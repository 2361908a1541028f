"""Scaling studies: the grid, what is read of its runs, the law, and the command around them."""

import json
import pathlib
import shlex

import numpy as np
import pytest
import tiny_run

from clip_jax.common import config_file
from clip_jax.errors import ExitCode, UserError
from clip_jax.models import flops, sizes
from clip_jax.sweep import cli, figure, grid, law, results
from clip_jax.sweep.results import Outcome
from clip_jax.training import cli as training
from clip_jax.training import train, workdir

CONFIG = "--config=quickstart:smoke"
WIDTHS = "model.size.image_width=32,64; model.size.image_layers=(1,),(2,)"
DURATIONS = "duration=10 steps,20 steps"

# ---- The law -----------------------------------------------------------------------------------

COMPUTE = np.geomspace(1e12, 1e15, 8)


def test_a_plain_law_is_recovered():
    value = 40 * COMPUTE**-0.12
    found = law.fit(COMPUTE, value)
    assert found.floor == 0
    assert found.exponent == pytest.approx(0.12, abs=1e-9)
    assert found.constant == pytest.approx(40, rel=1e-6)
    np.testing.assert_allclose(found.predict(COMPUTE), value)


def test_a_law_with_a_floor_is_recovered():
    found = law.fit(COMPUTE, 0.2 + 4e4 * COMPUTE**-0.4)
    assert found.floor == pytest.approx(0.2, rel=1e-4)
    assert found.exponent == pytest.approx(0.4, rel=1e-4)
    assert found.constant == pytest.approx(4e4, rel=1e-2)


@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_the_interval_covers_the_truth(floor):
    """About as often as it says, over draws of the noise."""
    rng = np.random.default_rng(0)
    compute = np.geomspace(1e12, 1e16, 12)
    covered, kind = [], []
    for _ in range(100):
        noise = np.exp(0.02 * rng.standard_normal(len(compute)))
        found = law.fit(compute, (floor + 4e4 * compute**-0.38) * noise)
        low, high = found.exponent_interval
        covered.append(low <= 0.38 <= high)
        kind.append(bool(found.floor) == bool(floor))
    assert np.mean(kind) >= 0.9
    assert 0.87 <= np.mean(covered) <= 1


def test_few_points_are_plain_and_too_few_are_not_fitted():
    assert law.fit(COMPUTE[:5], 0.2 + 4e4 * COMPUTE[:5] ** -0.4).floor == 0
    assert "needs 3 points, and the best runs are 2" in law.shortage(COMPUTE[:2])
    assert "factor of 1.20 in compute" in law.shortage(np.array([1.0, 1.1, 1.2]))
    assert law.shortage(COMPUTE[:3]) == ""


def test_the_frontier_is_what_no_other_beats():
    compute, value = np.array([3, 1, 2, 4, 4, 5]), np.array([0.5, 0.9, 0.95, 0.5, 0.4, 0.41])
    brute = [
        i
        for i in range(6)
        if not any(compute[j] <= compute[i] and value[j] <= value[i] for j in range(6) if j != i)
    ]
    assert law.frontier(compute, value) == sorted(brute, key=lambda i: compute[i]) == [1, 0, 4]


# ---- The grid ----------------------------------------------------------------------------------


def test_the_grid_is_every_combination():
    runs = grid.make_runs([CONFIG], [WIDTHS, DURATIONS])
    assert [run.name for run in runs] == [
        "image_width-32_duration-10-steps",
        "image_width-32_duration-20-steps",
        "image_width-64_duration-10-steps",
        "image_width-64_duration-20-steps",
    ]
    last = runs[-1].config
    assert (last.model.size.image_width, last.model.size.image_layers) == (64, (2,))
    assert last.duration == "20 steps"
    assert runs[-1].values == {"model.size.image_width": "64", "duration": "20 steps"}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ([], r"--grid is missing, as in python -m clip_jax sweep"),
        (["model.size.image_widht=32,64"], r"no setting model.size.image_widht. Did you mean"),
        (["batch_size=32,many"], r"batch_size=many"),
        (["batch_size"], r"no axis of a grid: write a setting and its values"),
        (["batch_size=32,"], r"no axis of a grid"),
        (["batch_size=32"], r"one value of batch_size: give several, or --config.batch_size=32"),
        (["batch_size=32,32"], r"the value 32 of batch_size twice"),
        (["batch_size=32,64", "batch_size=32,64"], r"batch_size is given twice"),
        (["seed=1,2"], r"seed is given twice"),
        (["batch_size=32,64; optim.learning_rate=1e-3"], r"one value of optim.learning_rate"),
        (["batch_size=8,16,32; optim.learning_rate=1e-3,2e-3"], r"3 of batch_size, 2 of optim"),
        (["optim.learning_rate=1e-3,0.001"], r"one run twice: learning_rate-1e-3 and learning"),
        (["data.crop=random,middle"], r"run crop-middle of the grid cannot be: .*data.crop is"),
        (["model.size.image_width=32,33"], r"image_width-33 .*cannot be"),
        (["duration=10 steps,10 stpes"], r"'10 stpes' is not a duration"),
    ],
)
def test_wrong_grids_are_named(axes, message):
    with pytest.raises(UserError, match=message):
        grid.make_runs([CONFIG, "--config.seed=3"], axes)


# ---- What is read ------------------------------------------------------------------------------


def write_run(place: pathlib.Path, rows: list[dict[str, float]]) -> None:
    place.mkdir(parents=True)
    (place / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_compute_and_scores_of_a_run(tmp_path):
    run = grid.make_runs([CONFIG], [WIDTHS, DURATIONS])[1]
    losses = np.linspace(4, 3, 21)
    rows = [{"step": step, "train/loss": losses[step]} for step in range(1, 21)]
    write_run(tmp_path / "run", [*rows, {"step": 20, "zeroshot/top1": 0.3}])
    found = results.read(run, tmp_path / "run", ["train/loss", "zeroshot/top1"])
    batch = run.config.batch_size
    size = sizes.get_size(run.config.model.name, run.config.model.size.to_dict())
    assert found.pairs == 20 * batch
    assert found.compute == 20 * flops.step_flops(size, batch, 1)
    assert found.scores["train/loss"] == pytest.approx(np.mean(losses[19:]))
    assert found.scores["zeroshot/top1"] == pytest.approx(0.7)
    with pytest.raises(UserError, match=r"no metric accuracy: .* train/loss, zeroshot/top1"):
        results.read(run, tmp_path / "run", ["accuracy"])
    with pytest.raises(UserError, match="has no metric train/loss"):
        results.read(run, tmp_path / "nothing", ["train/loss"])
    write_run(tmp_path / "odd", [{"step": 20, "train/mfu": 31.0}])
    with pytest.raises(UserError, match="neither a loss nor a fraction"):
        results.read(run, tmp_path / "odd", ["train/mfu"])


def outcome(width: str, compute: float, loss: float) -> Outcome:
    values = {"width": width, "duration": f"{compute:g} steps"}
    nan = {"loss": float("nan")}
    return Outcome(f"{width}-{compute:g}", values, 100, compute, {"loss": loss}, nan, 1)


def test_seeds_are_one_point():
    losses = [3.0, 3.3, 3.1]
    seeds = [outcome("32", 1e9, loss) for loss in losses]
    (one,) = results.merge_seeds(seeds)
    assert one.seeds == 3
    assert one.scores["loss"] == pytest.approx(np.mean(losses))
    assert one.spread["loss"] == pytest.approx(np.std(losses, ddof=1))
    text = results.table([one], [results.study([one], "loss")])
    assert "3.133 ±0.1528 *" in text
    assert "loss: not fitted, since a law needs 3 points, and the best runs are 1." in text


def test_the_table_and_the_figure():
    found = [outcome("32", c, 40 * c**-0.12) for c in (1e9, 2e9, 4e9)]
    found.append(outcome("64", 3e9, 9.0))
    found = results.merge_seeds(found)
    study = results.study(found, "loss")
    assert [found[i].compute for i in study.best] == [1e9, 2e9, 4e9]
    text = results.table(found, [study])
    assert "loss = 40 C^-0.120 over the 3 best (exponent 0.120 to 0.120: 95% intervals" in text
    assert figure.draw(found, [study, study]).startswith(b"\x89PNG")
    flat = [outcome("32", 1e9, 3.0), outcome("32", 2e9, 2.9), outcome("32", 4e9, 2.89)]
    assert "these runs do not tell an exponent" in results.sentence(results.study(flat, "loss"))


# ---- The command -------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch):
    """The names of the runs that were trained, by a trainer that only writes what one leaves."""
    names = []

    def fake(config, place, command):
        names.append(place.name)
        place.mkdir(parents=True)
        (place / "config.json").write_text(workdir.to_json(config))
        if config.optim.learning_rate > 1:
            raise UserError("The loss is nan at step 3.")
        steps = int(config.duration.split()[0])
        rows = [{"step": steps, "train/loss": 5 / steps, "zeroshot/top1": 1 - 1 / steps}]
        (place / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (place / "report.html").write_text("")

    monkeypatch.setattr(train, "train", fake)
    return names


def test_finished_runs_are_not_repeated(tmp_path, trained, capsys):
    words = [CONFIG, f"--workdir={tmp_path}", "--grid=duration=10 steps,20 steps,40 steps"]
    assert cli._run([*words, "--only=2"]) == ExitCode.DONE
    assert trained == ["duration-20-steps"]
    assert "1 of 3 runs are finished. Not: duration-10-steps, duration-40-steps." in (
        capsys.readouterr().out
    )
    assert cli._run([*words, "--report"]) == ExitCode.DONE
    assert trained == ["duration-20-steps"]
    assert cli._run(words) == ExitCode.DONE
    assert trained == ["duration-20-steps", "duration-10-steps", "duration-40-steps"]
    told = capsys.readouterr().out
    assert "train/loss = " in told
    assert "1 - zeroshot/top1 = " in told
    assert "C^-1.000 over the 3 best" in told
    assert (tmp_path / "sweep.png").exists()
    with pytest.raises(UserError, match="holds a run with other settings: seed was 0, now 1"):
        cli._run([*words, "--config.seed=1"])
    with pytest.raises(UserError, match="--only=4, but the grid has 3 runs"):
        cli._run([*words, "--only=4"])


def test_a_run_that_diverges_is_named_at_the_end(tmp_path, trained, capsys):
    words = [CONFIG, f"--workdir={tmp_path}", "--grid=optim.learning_rate=1e-3,9,2e-3"]
    assert cli._run(words) == ExitCode.USER_ERROR
    assert trained == [f"learning_rate-{rate}" for rate in ("1e-3", "9", "2e-3")]
    told = capsys.readouterr()
    assert told.err.endswith("learning_rate-9 failed: The loss is nan at step 3.\n")
    assert "2 of 3 runs are finished. Not: learning_rate-9." in told.out


def test_a_line_for_each_run(tmp_path, trained, capsys):
    """Each trains what the sweep itself would, in the same folder."""
    words = [CONFIG, "--config.batch_size", "48", f"--workdir={tmp_path}", f"--grid={WIDTHS}"]
    assert cli._run([*words, "--dry_run"]) == ExitCode.DONE
    _, runs = cli.parse(words)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(runs) == 2
    for line, run in zip(lines, runs):
        program, arguments = shlex.split(line)[:4], shlex.split(line)[4:]
        assert program == ["python", "-m", "clip_jax", "train"]
        parsed = config_file.parse(arguments, "", training._define)
        assert parsed.config == run.config
        assert parsed.config.batch_size == 48
        assert parsed.flags["workdir"] == str(tmp_path / run.name)
    assert not trained


@pytest.mark.slow
def test_a_real_sweep(tmp_path, capsys):
    settings = [f"--config.{name}={value}" for name, value in tiny_run.SETTINGS.items()]
    words = ["--config=vit_b32:smoke", *settings, f"--workdir={tmp_path}", "--grid=seed=1,2"]
    with tiny_run.compile_once():
        assert cli._run(words) == ExitCode.DONE
    for seed in (1, 2):
        place = tmp_path / f"seed-{seed}"
        with tiny_run.compile_once():
            train.train(tiny_run.config({"seed": seed}), tmp_path / f"alone-{seed}")
        assert tiny_run.learned(place) == tiny_run.learned(tmp_path / f"alone-{seed}")
    starts = sorted((tmp_path / "seed-1" / "starts").iterdir())
    assert cli._run(words) == ExitCode.DONE
    assert sorted((tmp_path / "seed-1" / "starts").iterdir()) == starts
    assert "not fitted, since a law needs 3 points" in capsys.readouterr().out
