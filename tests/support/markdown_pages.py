"""The pages that people read, taken apart: code blocks, links, anchors, commands."""

import pathlib
import re
import shlex
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(ROOT / "docs").glob("*.md"),
        ROOT / "benchmarks" / "README.md",
        ROOT / "launch" / "README.md",
        ROOT / "clip_jax" / "evaluate" / "sets" / "README.md",
    ]
)
_FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_HEREDOC = re.compile(r"<<'?(\w+)'?\n.*?^\1$", re.MULTILINE | re.DOTALL)
_ENDS = {"&&", "||", "|", ";", "&"}


class Block(NamedTuple):
    """A fenced block of code.

    Attributes:
      page: path of the page, relative to the repository.
      line: line number in the page, from 1.
      language: word after the opening fence.
      text: text without the fences.
    """

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


class Command(NamedTuple):
    """A simple command of a shell block: the words, without assignments before them."""

    where: str
    words: list[str]

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join(self.words)}"


def name(page: pathlib.Path) -> str:
    return page.relative_to(ROOT).as_posix()


def section(text: str, title: str) -> str:
    """The text below a heading, down to the next one of the same or a higher level."""
    found = re.search(
        rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,2}} |\Z)", text, re.MULTILINE | re.DOTALL
    )
    assert found, f"no heading {title!r}"
    return found[2]


def blocks(page: pathlib.Path, title: str | None = None) -> list[Block]:
    """The blocks of a page, or of the section with this title; indented ones too."""
    whole = page.read_text()
    text = whole if title is None else section(whole, title)
    before = whole[: whole.index(text)].count("\n")
    found = []
    for match in _FENCE.finditer(text):
        line = before + text[: match.start()].count("\n") + 1
        inner = re.sub(rf"^{match[1]}", "", match[3], flags=re.MULTILINE)
        found.append(Block(name(page), line, match[2].strip(), inner))
    return found


def prose(page: pathlib.Path) -> str:
    """A page without its blocks; lines keep their numbers."""
    return _FENCE.sub(lambda match: "\n" * match[0].count("\n"), page.read_text())


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} (.+)$", prose(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        if found[slug]:
            found[f"{slug}-{found[slug]}"] = 0
    return set(found)


def links(page: pathlib.Path) -> list[str]:
    """The targets of a page's links and pictures."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)


def code_spans(page: pathlib.Path) -> list[str]:
    """Finds the code between backticks in the prose."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(block: Block) -> list[Command]:
    """The commands of a shell block, one by one."""
    text = _HEREDOC.sub("", block.text).replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in _ENDS:
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words:
                    found.append(Command(str(block), words))
                words = []
            else:
                words.append(word)
    return found
