"""The style of docstrings: a summary is a verb phrase or a noun with its article."""

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = [path for folder in ("clip_jax", "configs") for path in (ROOT / folder).rglob("*.py")]
# Summaries that begin so are fragments, which a reader has to complete from the name.
SUMMARY = re.compile(r"(What|How|Of|Whether|As|Where|Which|The same)\b")
# Likewise the text after the name of an attribute or argument.
ENTRY = re.compile(r" +[\w*]+(, [\w*]+)*: (of|that|which)\b")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def faults(source: str) -> Iterator[str]:
    """Yields the summaries and entries that begin with a wrong word."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            summary, *lines = text.splitlines()
            yield from [summary] if SUMMARY.match(summary) else []
            yield from (line for line in lines if ENTRY.match(line))


def test_docstrings_begin_well():
    found = {str(path.relative_to(ROOT)): list(faults(path.read_text())) for path in FILES}
    assert len(found) > 100
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "text",
    [
        "What is read.",
        "The same, in float64.",
        "Reads.\n\n    Args:\n      seed: of the draws.\n    ",
        "A row.\n\n    Attributes:\n      low, high: that bound it.\n    ",
    ],
)
def test_wrong_docstrings_are_found(text: str):
    assert len(list(faults(f'def read():\n    """{text}"""\n'))) == 1
    assert len(list(faults(f'class Row:\n    """{text}"""\n'))) == 1
    assert not list(faults('"""The rows, as stored.\n\nAs a whole: of one file.\n"""\n'))
