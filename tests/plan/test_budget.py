"""python -m clip_jax plan --budget: what is typed, what is chosen, what is said."""

import json
import re
import shlex

import pytest

from clip_jax.common import clock, config_file
from clip_jax.configs import default
from clip_jax.errors import UserError
from clip_jax.plan import accuracy, budget, budget_cli, cli, units
from clip_jax.plan.chips import CHIPS

GIVEN = ["--budget=256 v5e-days", "--pairs=400M"]


def run(capsys, *arguments: str) -> str:
    cli.main(list(arguments))
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def law() -> accuracy.Law:
    return accuracy.Law(accuracy.published())


@pytest.mark.parametrize(
    ("text", "chip", "days"),
    [
        ("256 v5e-days", "v5e", 256),
        ("6,144 V5E-hours", "v5e", 256),
        ("1.5 v5p-weeks", "v5p", 10.5),
        ("1e3 tpu7x-day", "tpu7x", 1000),
    ],
)
def test_budget_is_read(text: str, chip: str, days: float):
    assert units.parse_budget(text) == units.Budget(CHIPS[chip], pytest.approx(days))


@pytest.mark.parametrize(
    ("text", "pairs"),
    [("400M", 4e8), ("1.4B", 1.4e9), ("400 million", 4e8), ("4e8", 4e8), ("12,800,000", 12.8e6)],
)
def test_pairs_are_read(text: str, pairs: float):
    assert units.parse_pairs(text) == pytest.approx(pairs)


@pytest.mark.parametrize("text", ["1.20 dollars/chip-hour", "28.8 dollars per v5e-day"])
def test_price_is_read(text: str):
    assert units.parse_price(text, CHIPS["v5e"]) == units.Price("dollars", pytest.approx(28.8))


WRONG = {
    "search's minutes": (["--budget=30"], r"no unit.*--search_minutes=30"),
    "with a config": (["--config=vit_b32", *GIVEN], r"neither --config nor"),
    "unknown chip": (["--budget=8 v3-days", "--pairs=1M"], r"no chip v3.*v5e"),
    "no time": (["--budget=8 v5e", "--pairs=1M"], r"'8 v5e' cannot be read.*v5e-days"),
    "nothing": (["--budget=0 v5e-days", "--pairs=1M"], r"nothing to spend"),
    "negative": (["--budget=-5 v5e-days", "--pairs=1M"], r"cannot be read"),
    "infinite": (["--budget=1e999 v5e-days", "--pairs=1M"], r"not finite"),
    "too small": (["--budget=1 v5e-hours", "--pairs=1M"], r"too small.*vit_b32.*needs 0\.0\d+"),
    "no budget": (["--pairs=1M"], r"--budget is missing"),
    "no pairs": (["--budget=8 v5e-days"], r"--pairs is missing"),
    "pairs without number": (["--budget=8 v5e-days", "--pairs=many"], r"'many' is no number"),
    "pairs of nothing": (["--budget=8 v5e-days", "--pairs=0"], r"less than one pair"),
    "price without unit": ([*GIVEN, "--price=1.20"], r"'1\.20' needs a number, a currency"),
    "price without time": ([*GIVEN, "--price=1.20 dollars"], r"dollars/chip-hour"),
    "other chip's price": ([*GIVEN, "--price=1 dollars/v4-hour"], r"not one of a v5e"),
    "other chip's slice": ([*GIVEN, "--topology=v5p:2x2x2"], r"not of the v5e"),
    "unknown data": ([*GIVEN, "--data=mine"], r"--data=mine has no published results.*LAION"),
    "no MFU": ([*GIVEN, "--mfu=40"], r"--mfu=40\.0 is no "),
}


@pytest.mark.parametrize("name", WRONG)
def test_user_errors(name: str, capsys):
    arguments, message = WRONG[name]
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)


def test_what_is_said(capsys):
    said = run(capsys, *GIVEN, "--price=1.20 dollars/chip-hour", "--data=laion")
    assert "256 v5e-days, 400M pairs, LAION; days on v5e:16x16" in said
    for words in ("image tokens", "text tokens", "pairs seen", "dollars", "interval"):
        assert words in said
    assert re.search(r"424 published results.*off by 1\.\d points", said)
    assert "7,373" in said  # 256 days of 24 hours at 1.20
    assert "python main.py --config=clipa:h14" in said
    assert "python -m clip_jax plan --config=clipa:h14 --topology=v5e:16x16 --stage=stage1" in said


def test_help(capsys):
    said = run(capsys, "--budget", "--help")
    for name in ("--budget", "--pairs", "--price", "--data", "--topology", "--mfu", "--json"):
        assert name in said


def test_json(capsys):
    fields = json.loads(run(capsys, *GIVEN, "--json=-", "--topology=v5e:8x8"))
    assert fields["leave_one_out"]["mean_absolute_error"] < 0.02
    best = fields["options"][0]
    assert best["days"] == pytest.approx(best["chip_days"] / 64)
    top1 = best["top1"]
    assert top1["low"] < top1["top1"] < top1["high"]


@pytest.mark.parametrize("spent", ["256 v5e-days", "3 v5e-days", "50 v4-days"])
def test_commands_are_those_of_the_options(law: accuracy.Law, spent: str):
    """The settings parse, and the run that they describe sees the pairs that are stated."""
    request = budget.Request(units.parse_budget(spent), 4e8, "LAION")
    topology = budget.whole_topology(request.budget)
    found = budget.options(request, law)
    assert len(found) > 5
    for option in found:
        train, _ = budget.commands(option, topology)
        given = config_file.parse(
            [word for word in shlex.split(train)[2:] if not word.startswith("--workdir")],
            "python main.py",
            lambda values: None,
        )
        parts = [default.of_stage(given.config, name) for name in given.config.stages]
        seen = 0.0
        for part, stage in zip(parts or [given.config], option.stages, strict=True):
            kind = {"batch_size": part.batch_size, "examples_per_epoch": 400_000_000}
            steps = clock.to_steps(part.duration, **kind)
            assert clock.to_steps(part.optim.warmup, **kind) <= max(1, 0.11 * steps)
            assert part.batch_size == stage.batch_size
            seen += steps * part.batch_size
        # A last stage of few pairs has few steps.
        assert seen == pytest.approx(option.seen, rel=0.01)
        assert option.days <= request.budget.days * 1.0001


def test_stored_plans_give_the_speed(law: accuracy.Law):
    """docs/scale.md: vit_l14 takes 65,200 pairs/s on 256 v5e."""
    request = budget.Request(units.parse_budget("256 v5e-days"), 4e8, "LAION")
    found = {option.config: option for option in budget.options(request, law)}
    assert found["vit_l14"].seen == pytest.approx(65_200 * 86_400, rel=0.001)
    assert found["vit_l14"].rate == "compiled"
    assert found["vit_h14"].settings == ("mesh.fsdp=16",)


def test_estimate_without_a_plan(law: accuracy.Law):
    """By hand: 6 operations of a pair and weight, near enough for ViT-L/14 (tokens x weights)."""
    request = budget.Request(units.parse_budget("100 v4-days"), 4e9, "LAION", mfu=0.5)
    found = {option.config: option for option in budget.options(request, law)}
    weights = 257 * 302e6 + 77 * 85e6
    seen = 100 * 86_400 * 275e12 * 0.5 / (6 * weights)
    assert found["vit_l14"].rate == "MFU 0.50"
    assert found["vit_l14"].seen == pytest.approx(seen, rel=0.1)


def test_beyond_the_published_results_is_said(capsys):
    said = run(capsys, "--budget=30 v5e-days", "--pairs=100k")
    assert re.search(r"Beyond the published results: 100k pairs.*Do not rely", said)
    said = run(capsys, "--budget=100000 v5p-days", "--pairs=2B")
    assert "are left over: no published run" in said


def test_no_run_is_longer_or_shorter_than_published_ones(law: accuracy.Law):
    for days in (3.0, 1e6):
        request = budget.Request(units.Budget(CHIPS["v5e"], days), 4e8, "LAION")
        for option in budget.options(request, law):
            recipe = budget.CONFIGS[option.config]
            seen = [r.setting.seen for r in accuracy.published() if r.setting.recipe == recipe]
            assert min(seen) <= option.seen * 1.0001
            assert option.seen <= max(seen) * 1.0001


@pytest.mark.parametrize(
    ("days", "name"),
    [("0.3 v5e", "1x1"), ("2 v5e", "1x2"), ("9 v5e", "2x4"), ("900 v5e", "16x16"),
     ("5 v5p", "2x2x1"), ("17 v5p", "2x2x4"), ("256 v5p", "4x8x8")],
)  # fmt: skip
def test_slice_is_busy_for_a_day(days: str, name: str):
    found = budget.whole_topology(units.parse_budget(f"{days}-days"))
    assert found.name.endswith(f":{name}")


def test_plain_search_is_no_budget():
    assert not budget_cli.is_meant(["--config=vit_b32", "--search", "--search_minutes=3"])
    assert budget_cli.is_meant(["--budget", "256 v5e-days"])


def test_errors_are_user_errors():
    with pytest.raises(UserError):
        units.parse_budget("all of them")
