"""Figures that configs quote from the paper are those of the data file of its tables."""

import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TABLES = json.loads((ROOT / "clip_jax" / "evaluate" / "published.json").read_text())
# Config and model of the paper, whose table 11 has the column "imagenet".
MODELS = {"vit_l14_336": "ViT-L/14@336px"}
MODELS |= {f"rn{name[2:].lower()}": name for name in TABLES["zeroshot"] if name.startswith("RN")}
MODELS |= {"vit_b32": "ViT-B/32", "vit_b16": "ViT-B/16", "vit_l14": "ViT-L/14"}


@pytest.mark.parametrize("config", MODELS)
def test_zero_shot_accuracy_of_a_config(config: str):
    quoted = re.search(r"In the paper: ([\d.]+) %", (ROOT / f"configs/{config}.py").read_text())
    assert quoted
    column = TABLES["datasets"].index("imagenet")
    assert float(quoted[1]) == TABLES["zeroshot"][MODELS[config]][column]


def test_all_models_of_the_tables_are_checked():
    assert set(MODELS.values()) == set(TABLES["zeroshot"]) == set(TABLES["linear_probe"])
