"""python -m clip_jax compare: tables, figures and curves against numbers worked out by hand."""

import csv
import dataclasses
import json
import pathlib
import re

import html_page
import numpy as np
import pytest

from clip_jax.evaluate import compare, comparison
from clip_jax.evaluate.comparison import Compared
from clip_jax.evaluate.results import About, Evaluation, Folder, Result, Score


def evaluation(name: str, flops: float, values: dict[str, float], **probes: float) -> Evaluation:
    """Zero-shot scores by data set (with half of each for bare names), and linear probes."""
    results = []
    for dataset, value in values.items():
        scores = [
            Score("zeroshot", dataset, "ensemble", "accuracy", value, value - 0.1, value + 0.1, 50),
            Score("zeroshot", dataset, "bare names", "accuracy", value / 2),
        ]
        results.append(Result("zeroshot", dataset, dataset.title(), "", "", tuple(scores), {}, 1.0))
    for dataset, value in probes.items():
        score = Score("linear_probe", dataset, "linear probe", "accuracy", value)
        results.append(Result("linear_probe", dataset, dataset.title(), "", "", (score,), {}, 1.0))
    about = About(name, f"runs/{name}", 1000, flops)
    return Evaluation(about, {"confidence": 0.995}, tuple(results), {}, "2026-03-04T12:30:00")


def write(directory: pathlib.Path, made: Evaluation) -> str:
    Folder(directory).write_all(made)
    return str(directory)


def write_run(workdir: pathlib.Path, accuracies: list[float], batch: int = 10) -> str:
    """A run with an evaluation each hundred steps, and nothing else."""
    workdir.mkdir()
    rows = [
        {"step": 100 * i, "zeroshot/top1": value, "eval/images_seen": 100 * i * batch}
        for i, value in enumerate(accuracies, start=1)
    ]
    rows.insert(1, {"step": 150, "train/loss": 2.0})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(workdir)


def test_models_and_the_paper_in_one_table(tmp_path, capsys):
    mine = write(tmp_path / "a", evaluation("ours", 1e9, {"cifar10": 0.5, "mine": 0.9}))
    compare.main([f"ours={mine}", "paper:ViT-B/32", f"--out={tmp_path / 'out'}"])
    page = html_page.check((tmp_path / "out" / "compare.html").read_text())
    printed = capsys.readouterr().out
    assert re.search(r"CIFAR-?10 +50\.0 % +91\.3 %", printed)
    assert re.search(r"Mine +90\.0 % +– *\n", printed)
    assert "mean of" not in printed.split("Linear probe")[0]  # one set in common makes no mean
    assert page.rows("models")[0][:2] == ["ours", "ours"]
    best = [bold["text"].replace("\xa0", " ") for bold in page.find("b")]
    assert "91.3 %" in best
    assert "50.0 %" not in best
    with (tmp_path / "out" / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == {"ours", "ViT-B/32 (paper)"}
    assert float(rows[0]["value"]) == 0.5
    assert "tables 10 (linear probe) and 11" in rows[-1]["source"]
    told = " ".join(printed.split())
    assert "Radford et al. 2021, tables 10 (linear probe) and 11 (zero-shot)" in told
    assert "The others are unchecked" in told


def test_means_are_over_what_all_have():
    found = [
        Compared("a", evaluation("RN50", 1e9, {"x": 0.2, "y": 0.4, "z": 1.0}), []),
        Compared("b", evaluation("RN101", 2e9, {"x": 0.6, "y": 0.2}), []),
        Compared("c", evaluation("RN50x4", 2e9, {"other": 0.9}), []),
    ]
    (table,) = comparison.tables(found[:2])
    assert table.common == 2
    assert table.means == pytest.approx((0.3, 0.4))
    # A model that shares nothing with the others does not take the figures away.
    assert comparison.common_means(found, "zeroshot") == pytest.approx({"a": 0.3, "b": 0.4})


def test_error_falls_as_a_power_of_compute():
    """Errors made to be 0.5 * compute ** -0.25 exactly."""
    found = [
        Compared(f"m{flops}", evaluation("RN50", flops * 1e9, {"x": 1 - 0.5 * flops**-0.25}), [])
        for flops in (1, 4, 16, 64)
    ]
    panel = comparison.power_law(found)
    assert "ResNets: error falls as compute to the power -0.250" in panel.note
    assert [line.name for line in panel.legend] == ["ResNets", "ResNets, fit"]


def test_images_it_takes(tmp_path):
    """Figure 2: the slowest run ends at 0.4; where the others pass that is interpolated."""
    slow = write_run(tmp_path / "slow", [0.1, 0.2, 0.3, 0.4])
    fast = write_run(tmp_path / "fast", [0.2, 0.6, 0.8, 0.9])
    falling = write_run(tmp_path / "falling", [0.5, 0.3, 0.2, 0.2])
    compare.main([f"slow={slow}", f"fast={fast}", f"falling={falling}", f"--out={tmp_path}"])
    page = html_page.check((tmp_path / "compare.html").read_text())
    rows = {row[0]: row[1:] for row in page.rows("efficiency")}
    assert {name: row[0] for name, row in rows.items()} == {
        "falling": "800",  # 1,000 images * 0.4 / 0.5
        "fast": "1,500",  # half-way from 0.2 to 0.6
        "slow": "4,000",
    }
    assert [rows[name][1] for name in ("falling", "fast", "slow")] == ["5", "2.7", "1"]
    assert rows["falling"][2].replace("\xa0", " ") == "20.0 %"


def test_a_curve_that_never_gets_there():
    assert np.isnan(comparison.images_to_reach([(10.0, 0.1), (20.0, 0.2)], 0.3))
    assert comparison.images_to_reach([(10.0, 0.3)], 0.3) == 10.0


def test_a_run_brings_its_latest_evaluation(tmp_path):
    run = write_run(tmp_path / "run", [0.1, 0.2])
    for step, value in ((90, 0.3), (200, 0.7)):
        write(tmp_path / "run" / f"evaluation-{step}", evaluation("ViT", 1e9, {"x": value}))
    (found,) = compare.read(run)
    assert found.headlines("zeroshot")["x"].value == 0.7
    assert found.curve == [(1000.0, 0.1), (2000.0, 0.2)]


def test_shifts_over_models():
    rows = [
        {"shift": "Blurred", "name": "blurred", "classifier": "zero-shot", "effective": None}
        | {"reference": reference, "shifted": shifted, "n": 10}
        for reference, shifted in ((0.5, 0.4), (0.7, 0.6), (0.9, 0.85))
    ]
    found = []
    for i, row in enumerate(rows):
        score = Score("robustness", "blurred", "zero-shot", "accuracy", row["shifted"])
        mean = dataclasses.replace(score, dataset="x", variant="mean")
        result = Result("robustness", "x", "X", "", "", (mean, score), {"rows": [row]}, 1.0)
        made = dataclasses.replace(evaluation(f"RN{i}", 1e9, {}), results=(result,))
        found.append(Compared(f"m{i}", made, []))
    (panel,) = comparison.shifts(found)
    assert panel.title == "Blurred"
    logit = lambda p: np.log(p / (1 - p))  # noqa: E731
    x, y = (logit(np.array([row[key] for row in rows])) for key in ("reference", "shifted"))
    assert f"slope {np.polyfit(x, y, 1)[0]:.4g}" in panel.note
    (table,) = comparison.tables(found)
    assert table.rows == (("blurred, zero-shot", tuple(r.scores[1] for r in map(only, found))),)


def only(compared: Compared) -> Result:
    (result,) = compared.evaluation.results
    return result


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["nowhere"], r"nowhere is neither.*evaluate"),
        (["paper:ViT-B/33"], r"'ViT-B/33'.*ViT-B/32"),
        (["paper:RN50", "paper:RN50"], r"Two.*'RN50 \(paper\)'.*other=paper:RN50"),
    ],
)
def test_a_mistake_gets_one_paragraph(arguments, wanted, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        compare.main([*arguments, f"--out={tmp_path}"])
    assert caught.value.code == 2
    assert re.search(wanted, capsys.readouterr().err.strip())
