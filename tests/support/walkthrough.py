"""Does what CONTRIBUTING.md says, in a copy of the repository."""

import os
import pathlib
import shutil
import subprocess
import sys

import markdown_pages
from markdown_pages import ROOT, Block

PAGE = ROOT / "CONTRIBUTING.md"
# What the JSON block is the text of; the page says so in prose.
DEFINITION = "clip_jax/evaluate/sets/definitions/garden_birds.json"
COPIED = ("clip_jax", "configs", "tests", "main.py", "pyproject.toml")


def copy(folder: pathlib.Path) -> pathlib.Path:
    """Copies what can be changed and run; returns where it is."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, folder / name, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True
            )
        else:
            shutil.copy(source, folder / name)
    return folder


def blocks(title: str) -> list[Block]:
    return markdown_pages.blocks(PAGE, title)


def apply(block: Block, folder: pathlib.Path) -> None:
    """Makes the change that a block shows; a shell block shows none."""
    if block.language == "json":
        assert DEFINITION in PAGE.read_text()
        (folder / DEFINITION).write_text(block.text)
    elif block.language == "diff":
        _patch(block.text, folder)
    elif block.language == "python":
        first, _, rest = block.text.partition("\n")
        path = folder / first.removeprefix("# ")
        if path.exists():
            path.write_text(f"{path.read_text()}\n\n{rest}")
        else:
            path.write_text(rest)


def _patch(text: str, folder: pathlib.Path) -> None:
    """Replaces lines; those before the change must stand in the file exactly once."""
    removed, added, *lines = text.splitlines()
    assert removed.removeprefix("--- ") == added.removeprefix("+++ ")
    path = folder / added.removeprefix("+++ ")
    assert all(line[:1] in (" ", "-", "+", "") for line in lines), text
    before = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
    after = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
    whole = path.read_text()
    assert whole.count(before) == 1, f"{path.name} does not have these lines once:\n{before}"
    path.write_text(whole.replace(before, after))


def run(arguments: list[str], folder: pathlib.Path) -> str:
    """Runs Python in the copy; returns what it printed."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(folder / "tests" / "support")])
    environment.pop("XLA_FLAGS", None)  # one device
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def try_it(title: str, folder: pathlib.Path, *flags: str) -> str:
    """Runs the commands of a walk-through, with more flags."""
    said = ""
    for block in blocks(title):
        for command in markdown_pages.commands(block) if block.language == "bash" else ():
            program, *arguments = command.words
            assert program == "python", command
            said += run([*arguments, *flags], folder)
    return said
