"""Curation run in this process, for tests."""

import json
from pathlib import Path

import pyarrow.parquet as pq

from clip_jax.curation import balancing


def run(data: Path | str, output: Path, *options: str) -> dict:
    """Runs in this process; returns the report."""
    queries = output.parent / "queries.txt"
    balancing.main(
        ["pairs", str(data), f"--queries={queries}", f"--out={output}", "--workers=1", *options]
    )
    return json.loads((output / "report.json").read_text())


def selection(output: Path) -> list[dict]:
    """All pairs kept, in order."""
    found = sorted((output / "selection").glob("*.parquet"))
    return [row for path in found for row in pq.read_table(path).to_pylist()]
