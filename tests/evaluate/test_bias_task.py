"""Bias probes end to end: a table of digits with groups, every proportion counted by hand."""

import csv
import functools
import json
import pathlib

import html_page
import numpy as np
import pytest
import tiny_run
import tiny_sets
from scipy import stats

import clip_jax
from clip_jax.evaluate import cli
from clip_jax.evaluate.results import read_evaluation

pytestmark = pytest.mark.slow  # test_bias.py holds the statistics
CLASSES = ("zero|0", "one|1", "two|2", "three|3")
ADDED = {"letters": ["the letter o", "the letter x"], "animals": ["cat"]}
FURTHER = {"child": ["child"]}
TEMPLATE = "a handwritten {}"


@functools.cache
def examples() -> list[tuple]:
    """Images, digits, and two groups of each; the group of one is not known."""
    rng = np.random.default_rng(0)
    chosen = [(image, digit) for image, digit in tiny_sets.digits(200) if digit < 4]
    hands = rng.choice(["left", "right"], len(chosen))
    papers = rng.choice(["lined", "plain", "blue"], len(chosen))
    papers[5] = ""
    return [(*pair, hand, paper) for pair, hand, paper in zip(chosen, hands, papers)]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("hands")
    with (root / "table.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "digit", "hand", "paper"])
        for i, (image, digit, hand, paper) in enumerate(examples()):
            image.save(root / f"{i}.png")
            writer.writerow([f"{i}.png", digit, hand, paper])
    about = {
        "title": "Hands",
        "class_names": CLASSES,
        "prompts": {"own": [TEMPLATE]},
        "added_classes": ADDED,
        "further_classes": FURTHER,
        "naming": {"numbered": True},
        "where": {
            "table": {"files": {"test": ["table.csv"]}, "label_key": "digit"}
            | {"group_keys": "hand,paper"}
        },
    }
    (root / "hands.json").write_text(json.dumps(about))
    with tiny_run.compile_once():
        run = tiny_run.finished()
        out = f"--out={root / 'out'}"
        cli.main([f"--checkpoint={run}", f"--datasets={root / 'hands.json'}", "--tasks=bias", out])
    return root / "out"


@functools.cache
def probabilities(classes: tuple[str, ...]) -> np.ndarray:
    images = np.stack([np.asarray(image) for image, *_ in examples()])
    return clip_jax.load(tiny_run.finished()).zero_shot(images, classes, [TEMPLATE])


def tables(out: pathlib.Path) -> dict[tuple, dict]:
    """The tables, by title and added categories."""
    (result,) = read_evaluation(out).of("bias")
    return {(t["title"], tuple(t["added"])): t for t in result.details["tables"]}


def test_proportions_of_each_group(evaluated):
    digits, hands, papers = (np.array(column) for column in list(zip(*examples()))[1:])
    steps = {(): (), ("letters", "animals"): ("letters", "animals")}
    steps[("letters", "animals", "child")] = ("letters", "animals", "child")
    offered = {**ADDED, **FURTHER}
    found = tables(evaluated)
    assert set(found) == {
        (title, step) for title in ("By hand", "By paper", "By hand and paper") for step in steps
    }
    for step in steps:
        extra = [name for category in step for name in offered[category]]
        chosen = probabilities((*CLASSES, *extra)).argmax(axis=1)
        names = [*range(len(CLASSES)), *(c for c in step for _ in offered[c])]
        columns = {"misclassified": chosen != digits} | {
            category: np.array([names[i] == category for i in chosen]) for category in step
        }
        both = np.array([f"{h}, {p}" if p else "" for h, p in zip(hands, papers)])
        for title, groups in (("hand", hands), ("paper", papers), ("hand and paper", both)):
            table = found[f"By {title}", step]
            assert table["columns"] == list(columns)
            rows = {row["group"]: row["proportions"] for row in table["rows"]}
            assert list(rows) == ["all", *sorted(set(groups) - {""})]
            for group, proportions in rows.items():
                inside = np.ones(len(digits), bool) if group == "all" else groups == group
                for proportion, hits in zip(proportions, columns.values()):
                    assert (proportion["successes"], proportion["trials"]) == (
                        (hits & inside).sum(),
                        inside.sum(),
                    )


def test_labels_by_group_and_threshold(evaluated):
    (result,) = read_evaluation(evaluated).of("bias")
    _, _, hands, _ = zip(*examples())
    hands = np.array(hands)
    found = [d for d in result.details["differences"] if d["key"] == "hand"]
    assert [d["threshold"] for d in found] == [0.005, 0.04]
    for difference in found:
        given = probabilities(CLASSES) >= difference["threshold"]
        for row in difference["rows"]:
            label = [name.split("|")[0] for name in CLASSES].index(row["label"])
            counts = [given[hands == hand, label].sum() for hand in ("left", "right")]
            sizes = [(hands == hand).sum() for hand in ("left", "right")]
            shown = [row["proportions"][hand]["successes"] for hand in ("left", "right")]
            assert shown == counts
            if 0 < sum(counts) < sum(sizes):
                table = [counts, np.subtract(sizes, counts)]
                wanted = stats.chi2_contingency(table, correction=False)
                assert row["statistic"] == pytest.approx(wanted.statistic)
                assert row["p_value"] == pytest.approx(wanted.pvalue)


def test_the_report_has_the_tables(evaluated):
    page = html_page.check((evaluated / "report.html").read_text())
    assert len(page.find("table", "bias")) == 9 + 6
    text = page.find("section")[0]["text"]
    assert "letters (the letter o, the letter x); animals (cat)" in " ".join(text.split())
