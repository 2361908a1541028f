"""A Sphinx extension: pages of the site whose text stands elsewhere in the repository.

A page such as launch.md is a pointer for readers of the repository; in the site the text of
launch/README.md takes its place. Links between all of them are made to lead to the page in the
site.
"""

import os
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
# The file whose text a page has, relative to the repository.
PAGES = {
    "start": "README.md",
    "contributing": "CONTRIBUTING.md",
    "changelog": "CHANGELOG.md",
    "launch": "launch/README.md",
    "benchmarks": "benchmarks/README.md",
    "sets": "clip_jax/evaluate/sets/README.md",
}
_LINK = re.compile(r'(\]\(|<img src=")([^)\s"#:]+)((?:#[^)\s"]*)?[)"])')
_TO_DIRECTORY = re.compile(r"\[([^\]]+)\]\(([^)\s#:]+)/\)")


def setup(app) -> dict:
    """Registers the extension."""
    app.connect("source-read", _read)
    return {"parallel_read_safe": True}


def _read(app, docname: str, source: list[str]) -> None:
    """Replaces the text of a page by what it stands for, with links as the site needs them."""
    path = ROOT / PAGES.get(docname, f"docs/{docname}.md")
    text = path.read_text() if docname in PAGES else source[0]
    source[0] = rewrite(text, path.parent)


def rewrite(text: str, directory: pathlib.Path) -> str:
    """Returns a page's text with its links relative to docs/.

    Args:
      text: Markdown.
      directory: directory that its links are relative to.
    """
    docnames = {(ROOT / path).resolve(): f"{name}.md" for name, path in PAGES.items()}

    def link(match: re.Match) -> str:
        target = (directory / match[2]).resolve()
        moved = docnames.get(target) or os.path.relpath(target, DOCS)
        return f"{match[1]}{moved}{match[3]}"

    # A directory is no page; its own README.md is one, where it has any.
    return _LINK.sub(link, _TO_DIRECTORY.sub(r"\1", text))
