"""Everything built from docs/: the site, its settings tables, and the notebook's outputs."""

import ast
import importlib
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import markdown_pages
import nbclient
import nbformat
import pytest
import tiny_run
from markdown_pages import ROOT
from ml_collections import ConfigDict

import clip_jax
from clip_jax.configs import default

DOCS = ROOT / "docs"


@pytest.fixture(scope="module", autouse=True)
def extensions():
    sys.path.insert(0, str(DOCS))
    yield
    sys.path.remove(str(DOCS))


# ---- Settings ----------------------------------------------------------------------------------


def values_of(config: ConfigDict, prefix: str = "") -> dict:
    """The value of every field, by dotted name."""
    found = {}
    for name in config:
        value = config.get(name)
        if isinstance(value, ConfigDict) and len(value):
            found |= values_of(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def value_of(text: str):
    """Evaluates a default, quotients included."""
    return eval(compile(ast.parse(text, mode="eval"), "default", "eval"), {"__builtins__": {}})


def test_the_settings_are_those_of_the_config():
    tables = importlib.import_module("settings_tables")
    found = {each.name: each for each in tables.read() if each.default is not None}
    wanted = values_of(default.get_config())
    assert list(found) == list(dict.fromkeys(each.name for each in found.values()))
    assert found.keys() == wanted.keys()
    for name, setting in found.items():
        value = wanted[name].to_dict() if isinstance(wanted[name], ConfigDict) else wanted[name]
        assert value_of(setting.default) == value, name
    text = tables.markdown(tables.read())
    for name in wanted:
        assert f"| `{name}` |" in text or re.search(r"\.source\.", name), name


def test_comments_are_told_apart():
    tables = importlib.import_module("settings_tables")
    text = textwrap.dedent(
        """
        def get_config():
            config = ConfigDict()
            config.a = 1  # beside
            # Above,
            # in two lines.
            config.b = (1, 2)
            config.c = 3
            config.inner = _inner()


        def _inner():
            inner = ConfigDict()
            inner.d = (
                "x#y"  # of a wrapped value
            )
            # Of the group.
            deep = ConfigDict()
            deep.e = placeholder(int)  # a | b
            inner.deep = deep
            return inner
        """
    )
    found = {s.name: (s.default, s.comment) for s in tables.read(text)}
    assert found == {
        "a": ("1", "beside"),
        "b": ("(1, 2)", "Above, in two lines."),
        "c": ("3", ""),
        "inner": (None, ""),
        "inner.d": ('"x#y"', "of a wrapped value"),
        "inner.deep": (None, "Of the group."),
        "inner.deep.e": ("None", "a | b"),
    }
    assert "a \\| b" in tables.markdown(tables.read(text))


# ---- The site ----------------------------------------------------------------------------------


def test_links_of_pages_from_elsewhere():
    rewrite = importlib.import_module("outside_pages").rewrite
    for text, directory, wanted in (
        ("[a](docs/data.md#rate)", "", "[a](data.md#rate)"),
        ("[a](CONTRIBUTING.md)", "", "[a](contributing.md)"),
        ("[a](launch/) [b](LICENSE)", "", "a [b](../LICENSE)"),
        ("[a](../README.md#install)", "docs", "[a](start.md#install)"),
        ("[a](../docs/storage.md)", "launch", "[a](storage.md)"),
        ("[a](https://example.org/x.md)", "", "[a](https://example.org/x.md)"),
        ('<img src="docs/figure2.png"', "", '<img src="figure2.png"'),
    ):
        assert rewrite(text, ROOT / directory) == wanted


def test_the_site_is_built_without_warnings(tmp_path: pathlib.Path):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    done = subprocess.run([*command, "docs", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    settings = (tmp_path / "settings.html").read_text()
    assert "optim.learning_rate" in settings
    assert "eval.batch_size" in settings
    api = (tmp_path / "api.html").read_text()
    for name in ("load", "Model.zero_shot", "losses.softmax_loss", "errors.UserError"):
        assert f'id="clip_jax.{name}"' in api, name
    start = (tmp_path / "start.html").read_text()
    assert 'href="data.html#names-of-columns"' in start
    for page in DOCS.glob("*.md"):
        assert (tmp_path / f"{page.stem}.html").is_file()


# ---- The notebook ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_notebook(tmp_path: pathlib.Path, monkeypatch):
    here = pathlib.Path(sys.executable).parent  # as where the environment is activated
    monkeypatch.setenv("PATH", str(here), prepend=os.pathsep)
    notebook = nbformat.read(DOCS / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not committed"
    run = tiny_run.finished()
    (place,) = [cell for cell in notebook.cells if cell.source == 'MODEL = "runs/quickstart"']
    place.source = f"MODEL = {str(run)!r}"
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    said = ["".join(out.get("text", "") for out in c.get("outputs", ())) for c in notebook.cells]
    accuracy, hits, searched = (text for text in said if text)
    assert re.match(r"\d+% of 50 scans", accuracy)
    assert "100 examples in 1 part(s)" in searched

    model = clip_jax.load(run)
    paths = sorted((tmp_path / "notebook_pictures").glob("*.png"))
    assert len(paths) == 100
    scores = model.encode_text("the digit seven") @ model.encode_image(paths).T
    best = paths[scores.argmax()].name
    assert hits.startswith(f"[('{best}'")
    assert best in searched.split("the digit seven")[-1]  # among ten of a hundred, in float16


def test_no_page_is_left_out_of_the_tests():
    listed = {markdown_pages.name(page) for page in markdown_pages.PAGES}
    tracked = subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(tracked) <= listed
