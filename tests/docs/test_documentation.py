"""The pages say what is there: links, commands, snippets, settings, files, the README's tree."""

import ast
import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import fake_cloud
import markdown_pages
import pytest
import walkthrough
from markdown_pages import PAGES, ROOT, Block, Command
from ml_collections import ConfigDict

from clip_jax.__main__ import COMMANDS
from clip_jax.configs import default
from clip_jax.training import validation

LANGUAGES = {"bash", "python", "json", "text", "diff", "{settings}", "{eval-rst}", "{toctree}"}
# Programs of others: that they are called so is all that is known here.
FOREIGN = {"git", "source", "img2dataset", "tfds", "cat", "gcloud", "kubectl", "sinfo"}
FOREIGN |= {"kill", "xprof"}
TOOLS = {"ruff", "pyrefly"}  # requirements-dev.txt
LAUNCHERS = {"launch/tpu.sh", "launch/gke.sh", "launch/slurm.sh"}
MODULES = {"pytest", "venv", "sphinx", "nltk.downloader"}

every_page = pytest.mark.parametrize("page", PAGES, ids=markdown_pages.name)


def all_blocks(*languages: str) -> list[Block]:
    found = [block for page in PAGES for block in markdown_pages.blocks(page)]
    return [block for block in found if block.language in languages]


@functools.cache
def all_commands() -> tuple[Command, ...]:
    found = [markdown_pages.commands(block) for block in all_blocks("bash")]
    return tuple(command for commands in found for command in commands)


def test_the_pages_are_found():
    assert len(PAGES) > 15
    assert len(all_commands()) > 60
    assert len(all_blocks("python")) >= 5


# ---- Links and files ---------------------------------------------------------------------------


@every_page
def test_links_resolve(page: pathlib.Path):
    for link in markdown_pages.links(page):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), link
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{link} leads nowhere"
        assert path.is_relative_to(ROOT), link
        if anchor:
            assert anchor in markdown_pages.anchors(path), f"{link}: no such heading"


@every_page
def test_files_that_are_named_exist(page: pathlib.Path):
    made = set(re.findall(r"^ *# ([\w/.]+\.py)$", page.read_text(), re.MULTILINE))
    made |= {walkthrough.DEFINITION} if page == walkthrough.PAGE else set()
    pattern = r"(?<![\w/.])(?:configs|clip_jax|docs|tests|launch|benchmarks)/[\w/]+\.[a-z]+\b"
    named = set(re.findall(pattern, page.read_text()))
    named |= set(re.findall(r"\brequirements[\w-]*\.txt", page.read_text()))
    missing = {name for name in named - made if not (ROOT / name).exists()}
    assert not missing


def test_every_page_of_docs_is_in_the_list_of_pages():
    index = (ROOT / "docs" / "index.md").read_text()
    (tree,) = [b.text for b in markdown_pages.blocks(ROOT / "docs" / "index.md")]
    listed = set(tree.split()) - {":hidden:"}
    assert listed == {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    readme = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        if "This page of the site is" in page.read_text():
            continue  # it stands for a file elsewhere
        assert page.stem == "index" or f"(docs/{page.name})" in readme, page.name
        assert page.stem == "index" or f"({page.name})" in index, page.name


# ---- The README --------------------------------------------------------------------------------


def tree() -> dict[str, str]:
    """The rooms that the README's tree names, by path, and what it says of them."""
    (block,) = markdown_pages.blocks(ROOT / "README.md", "How it is built")
    found, parent = {}, ""
    for line in block.text.splitlines():
        name, _, purpose = line.strip().partition(" ")
        inner = line.startswith(" ")
        parent = parent if inner else name
        found[parent + name if inner else name] = purpose.strip()
    return found


def test_the_tree_is_the_tree():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    rooms = {path.partition("/")[0] + "/" for path in tracked if "/" in path}
    rooms = {room for room in rooms if not room.startswith(".")} | {"main.py"}
    within = [path.split("/") for path in tracked if path.startswith("clip_jax/")]
    rooms |= {f"clip_jax/{parts[1]}/" for parts in within if len(parts) > 2}
    rooms |= {f"clip_jax/{parts[1]}" for parts in within if len(parts) == 2}
    assert tree().keys() == rooms - {"clip_jax/__init__.py", "clip_jax/py.typed"}
    assert all(tree().values()), "a room without a word about it"


def test_what_the_tree_says_lies_within_a_room_does():
    for room, purpose in tree().items():
        for inner in re.findall(r"\b(\w+)/", purpose):
            assert (ROOT / room / inner).is_dir(), f"{room} has no {inner}/"
        for inner in re.findall(r"\b(\w+\.py)\b", purpose):
            assert inner == "NAME.py" or (ROOT / room / inner).is_file(), f"{room}: {inner}"


def test_the_readme_is_for_newcomers():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 260


def test_what_ci_takes_from_the_readme():
    """.ci/run installs and tests by the first lines that have these."""
    lines = (ROOT / "README.md").read_text().splitlines()
    install = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt"
    assert any(line.startswith(install) for line in lines)
    for file in ("requirements-dev.txt", "requirements-parity.txt"):
        command = next(line for line in lines if f"pip install -r {file}" in line)
        assert command.endswith(("-m 'not slow'", "tests/parity"))


# ---- Settings ----------------------------------------------------------------------------------


def names_of(config: ConfigDict, prefix: str = "") -> set[str]:
    """All fields and groups, dotted."""
    found = set()
    for name in config:
        found.add(prefix + name)
        value = config.get(name)
        if isinstance(value, ConfigDict):
            found |= names_of(value, f"{prefix}{name}.")
    return found


SETTINGS = names_of(default.get_config())


@every_page
def test_settings_that_are_named_exist(page: pathlib.Path):
    if page.name == "CHANGELOG.md":
        return  # it names what was there
    named = set(re.findall(r"--config\.([a-z_0-9.]+)", page.read_text()))
    for span in markdown_pages.code_spans(page):
        match = re.fullmatch(r"([a-z_0-9]+(?:\.[a-z_0-9]+)+)(?:[= ].*)?", span)
        top = match and match[1].partition(".")[0]
        if match and top in SETTINGS and not re.search(r"\.(py|md|json|txt)$", match[1]):
            named.add(match[1])
        if match := re.fullmatch(r"([a-z]+(?:_[a-z]+)+)=.*", span):
            keys = SETTINGS | {f"data.source.{name}" for name in default.source()}
            assert match[1] in {key.rpartition(".")[2] for key in keys}, span
    assert not {name.rstrip(".") for name in named} - SETTINGS


# ---- Commands ----------------------------------------------------------------------------------


def kind(command: Command) -> str:
    """Who has to understand a command."""
    program, *rest = command.words
    program = program.removeprefix(".venv/bin/")
    if program in ("python", "python3"):
        if rest[0] == "main.py" or rest[:2] == ["-m", "clip_jax"]:
            return "ours"
        if rest[0] == "-m":
            return "module" if rest[1] in MODULES else "unknown"
        return "script"
    if program == "pip" or program in LAUNCHERS:
        return program
    return "foreign" if program in FOREIGN | TOOLS else "unknown"


def test_every_program_is_known():
    unknown = [str(command) for command in all_commands() if kind(command) == "unknown"]
    assert not unknown


def complaints(command_lines: list[list[str]]) -> list[str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "parse_commands.py")],
        input=json.dumps(command_lines),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    return json.loads(done.stdout)


def test_our_commands_are_parsed():
    ours = [command for command in all_commands() if kind(command) == "ours"]
    # Those of the walk-throughs need what they add: test_contributing.py runs them.
    ours = [command for command in ours if not command.where.startswith("CONTRIBUTING.md")]
    assert {command.words[1] for command in ours} == {"main.py", "-m"}
    found = complaints([command.words[1:] for command in ours])
    wrong = [f"{command}: {what}" for command, what in zip(ours, found) if what]
    assert not wrong, "\n".join(wrong)


def test_wrong_commands_are_found():
    """The test above relies on this."""
    assert all(
        complaints(
            [
                ["main.py", "--config=configs/nothing.py"],
                ["main.py", "--config=configs/quickstart.py", "--config.batchsize=3"],
                ["main.py", "--config=configs/quickstart.py", "--config.batch_size=many"],
                ["main.py", "--config=configs/quickstart.py", "--config.data.crop=middle"],
                ["main.py", "--config=configs/vit_b32.py"],  # names no data
                ["-m", "clip_jax", "nothing"],
                ["-m", "clip_jax", "evaluate", "--checkpoint=x", "--nothing"],
                ["-m", "clip_jax", "data", "nothing", "x"],
                ["-m", "clip_jax", "data", "pack", "x"],
                ["-m", "clip_jax", "convert", "a", "--to=openai"],
                ["-m", "clip_jax", "plan", "--config=configs/vit_b32.py"],
                ["-m", "clip_jax", "plan", "--config=configs/vit_b32.py", "--topology=v9:1"],
            ]
        )
    )
    search = ["-m", "clip_jax", "search", "--model=m", "--embeddings=e", "a word"]
    assert complaints([search]) == [""]


def test_commands_within_the_prose_exist():
    for page in PAGES:
        for span in markdown_pages.code_spans(page):
            if match := re.match(r"python -m clip_jax ([\w-]+)", span):
                assert match[1] in COMMANDS, f"{markdown_pages.name(page)}: {span}"


def test_packages_that_are_installed():
    for command in all_commands():
        if kind(command) != "pip":
            continue
        verb, *rest = command.words[1:]
        assert verb == "install", command
        for flag, value in zip(rest, [*rest[1:], ""]):
            if flag == "-r":
                assert (ROOT / value).is_file(), command
            elif not flag.startswith("-") and not (ROOT / flag).is_file():
                assert re.fullmatch(r"\.|[\w.-]+(\[[\w,]+\])?([<>=]=?[\d.]+)?", flag), command


def test_scripts_and_their_flags():
    """Flags are looked for among those that a script declares; some need what is not installed."""
    scripts = [command for command in all_commands() if kind(command) == "script"]
    spans = [span for page in PAGES for span in markdown_pages.code_spans(page)]
    scripts += [
        Command("", span.split()) for span in spans if span.startswith("python benchmarks/")
    ]
    assert {f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py")} - {
        command.words[1] for command in scripts
    } == {"benchmarks/turns.py"}  # what they share
    for command in scripts:
        path = ROOT / command.words[1]
        assert path.is_file(), command
        declared = {
            node.args[0].value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)
        }
        for word in command.words[2:]:
            assert word.partition("=")[0] in declared, command


def test_tests_that_are_run_exist():
    for command in all_commands():
        if "pytest" in command.words:
            for word in command.words:
                assert "/" not in word or word.startswith(".venv") or (ROOT / word).exists()


def test_launch_commands(tmp_path: pathlib.Path):
    """Each with --dry-run, in a folder that has the files the page writes first."""
    repository = fake_cloud.make_repository(tmp_path / "clip_jax")
    text = (ROOT / "launch" / "README.md").read_text()
    heredoc = r"^cat >(\S+) <<'END'\n(.*?)^END$"
    for name, settings in re.findall(heredoc, text, re.MULTILINE | re.DOTALL):
        (repository / name).write_text(settings)
    found = [command for command in all_commands() if kind(command) in LAUNCHERS]
    assert {kind(command) for command in found} == LAUNCHERS
    for command in found:
        words = [word for word in command.words[1:] if word != "..."]
        at = words.index("--") if "--" in words else len(words)
        words[at:at] = ["--dry-run"]
        done = fake_cloud.launch(
            repository, words, fake_cloud.environment(), program=command.words[0]
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"


# ---- Snippets ----------------------------------------------------------------------------------


def test_every_block_says_what_it_is():
    blocks = [block for page in PAGES for block in markdown_pages.blocks(page)]
    assert not [str(block) for block in blocks if block.language not in LANGUAGES]


@pytest.mark.parametrize("block", all_blocks("python"), ids=str)
def test_python_compiles(block: Block):
    compile(block.text, str(block), "exec")


@pytest.mark.parametrize("block", all_blocks("json"), ids=str)
def test_json_loads(block: Block):
    json.loads(block.text)


@pytest.mark.parametrize("block", all_blocks("bash"), ids=str)
def test_the_shell_understands(block: Block):
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_mixture():
    (block,) = [b for b in all_blocks("python") if b.page == "docs/data.md"]
    names: dict = {}
    exec(compile(block.text, str(block), "exec"), names)
    config = names["get_config"]()
    validation.validate(config)
    assert set(config.data.mixture) == {"cc12m", "mine"}
    assert names["get_config"]("smoke").duration == "20 steps"
