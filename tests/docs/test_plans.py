"""The plans that benchmarks/plans.py keeps, and what the pages and the configs say of them."""

import importlib
import json
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import plans  # noqa: E402

STORED = json.loads(plans.FILE.read_text())
WHOLE = [row for row in plans.ROWS if str(row) in STORED]


def test_every_plan_is_of_a_row():
    assert set(STORED) <= {str(row) for row in plans.ROWS + plans.CHECKS}
    assert WHOLE


def test_the_page_has_the_stored_plans():
    page = (ROOT / "docs/scale.md").read_text()
    for line in plans.table(STORED).splitlines():
        assert line in page


@pytest.mark.parametrize("row", [row for row in WHOLE if row.topology == plans.POD], ids=str)
def test_a_config_says_what_its_plan_says(row):
    text = importlib.import_module(f"configs.{row.config}").__doc__
    text, kept = " ".join(text.split()), STORED[str(row)]
    gib, ms, pairs = re.search(
        r"256 chips: ([\d.]+) GiB of 15.75 on each, ([\d,]+) ms per step, ([\d,]+) pairs/s", text
    ).groups()
    assert gib == f"{kept['gib']:.1f}"
    assert ms == f"{kept['ms']:,.0f}"
    assert float(pairs.replace(",", "")) == float(f"{kept['pairs_per_second']:.3g}")
    for setting in row.settings:
        assert f"--config.{setting}" in text


def test_a_slower_plan_ends_with_an_error(monkeypatch, capsys):
    row = plans.CHECKS[0]
    monkeypatch.setattr(plans, "plan", lambda row: {"ms": 104.9})
    plans.check([row], {str(row): {"ms": 100.0}})
    assert "+4.9% of 100.0 ms" in capsys.readouterr().out
    monkeypatch.setattr(plans, "plan", lambda row: {"ms": 105.1})
    with pytest.raises(SystemExit, match=f"More than 5% slower.*{re.escape(str(row))}"):
        plans.check([row], {str(row): {"ms": 100.0}})
