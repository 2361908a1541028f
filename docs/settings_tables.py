"""A Sphinx extension: the directive `settings`, a table of the fields of configs/default.py.

Names, default values and comments are read off the assignments of the file, in its order. The
fields of model.size and their texts are those of `clip_jax.models.Size`.
"""

import ast
import dataclasses
import inspect
import io
import pathlib
import re
import tokenize

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from clip_jax.models import sizes

FILE = pathlib.Path(__file__).parents[1] / "configs" / "default.py"
_EMPTY = ("mixture", "stages")  # functions whose result has no fields, without arguments


@dataclasses.dataclass(frozen=True)
class Setting:
    """A field of the config, or a group of fields.

    Attributes:
      name: dotted name.
      default: source text of the default; None: a group.
      comment: text of the comments.
    """

    name: str
    default: str | None
    comment: str


def setup(app) -> dict:
    """Registers the extension."""
    app.add_directive("settings", Settings)
    return {"parallel_read_safe": True}


class Settings(SphinxDirective):
    """The tables, a section for each group."""

    def run(self) -> list[nodes.Node]:
        """Returns the parsed tables."""
        self.env.note_dependency(str(FILE))
        return self.parse_text_to_nodes(markdown(read()), allow_section_headings=True)


def markdown(settings: list[Setting]) -> str:
    """Returns the tables as Markdown; a group with the fields of an earlier one refers to it."""
    groups = [Setting("", None, ""), *(each for each in settings if each.default is None)]
    shown: dict[tuple[tuple[str, str | None], ...], str] = {}
    parts = []
    for group in groups:
        fields = [s for s in settings if s.default is not None and _parent(s.name) == group.name]
        if not fields:
            continue
        parts.append(f"## {group.name or 'The run'}\n\n{_escaped(group.comment)}\n")
        content = tuple((s.name.removeprefix(group.name), s.default) for s in fields)
        if (earlier := shown.setdefault(content, group.name)) != group.name:
            parts.append(f"The fields are those of `{earlier}`.\n")
            continue
        rows = [f"| `{s.name}` | {_code(s.default)} | {_escaped(s.comment)} |" for s in fields]
        parts.append("\n".join(["| setting | default | |", "|---|---|---|", *rows, ""]))
    return "\n".join(parts)


def read(text: str | None = None) -> list[Setting]:
    """Returns all fields and groups in the order of the file.

    Args:
      text: source text; None: that of the file.
    """
    text = FILE.read_text() if text is None else text
    comments = _Comments(text)
    functions = {
        node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)
    }

    def fields(function: str, prefix: str) -> list[Setting]:
        if function == "_size":
            return [Setting(f"{prefix}.{n}", "None", text) for n, text in _size_fields()]
        assigned = [node for node in functions[function].body if isinstance(node, ast.Assign)]
        names = _names(assigned, prefix)
        found = []
        for node in assigned:
            name, called = _dotted(node.targets[0], names), _called(node.value)
            if name == prefix or isinstance(node.value, ast.Name):
                continue  # the group itself, and one that was listed where it was made
            if called == "ConfigDict":
                found.append(Setting(name, None, comments.of(node)))
            elif called in functions and called not in _EMPTY:
                documented = ast.get_docstring(functions[called]) or ""
                found.append(Setting(name, None, comments.of(node) or documented))
                found += fields(called, name)
            else:
                found.append(Setting(name, _default(text, node.value), comments.of(node)))
        return found

    return fields("get_config", "")


def _size_fields() -> list[tuple[str, str]]:
    """Returns the fields of model.size, and the text of each in the docstring of `Size`."""
    attributes = inspect.cleandoc(sizes.Size.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", attributes, re.MULTILINE)
    texts = {name: re.sub(r"\s+", " ", text) for name, text in entries}
    return [(name, texts[name]) for name in sizes.CONFIGURABLE]


def _names(assigned: list[ast.Assign], prefix: str) -> dict[str, str]:
    """Returns the dotted names of the local variables of a function that makes a config.

    The first is what it returns; the others are assigned to a field further down.
    """
    targets = [node.targets[0] for node in assigned]
    names = {next(target.id for target in targets if isinstance(target, ast.Name)): prefix}
    for node, target in zip(assigned, targets):
        if isinstance(target, ast.Attribute) and isinstance(node.value, ast.Name):
            names[node.value.id] = _dotted(target, names)
    return names


def _dotted(target: ast.expr, names: dict[str, str]) -> str:
    if isinstance(target, ast.Name):
        return names[target.id]
    inner = _dotted(target.value, names)
    return f"{inner}.{target.attr}" if inner else target.attr


def _called(value: ast.expr) -> str:
    """Returns the name of the function that a value calls; "": it is not such a call."""
    called = isinstance(value, ast.Call) and isinstance(value.func, ast.Name)
    return value.func.id if called else ""


def _default(text: str, value: ast.expr) -> str:
    if _called(value) == "placeholder":
        return "None"
    if _called(value) in _EMPTY:
        return "{}"
    if isinstance(value, ast.Tuple):  # it may stand on several lines
        return ast.unparse(value)
    return ast.get_source_segment(text, value)


class _Comments:
    """The comments of a file, by line."""

    def __init__(self, text: str):
        self._beside: dict[int, str] = {}
        self._alone: dict[int, str] = {}
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                alone = token.line.strip() == token.string
                kept = self._alone if alone else self._beside
                kept[token.start[0]] = token.string.lstrip("# ")

    def of(self, node: ast.stmt) -> str:
        """Returns the comments above a statement and beside it."""
        above = []
        line = node.lineno - 1
        while line in self._alone:
            above.insert(0, self._alone[line])
            line -= 1
        lines = range(node.lineno, node.end_lineno + 1)
        beside = [self._beside[line] for line in lines if line in self._beside]
        return " ".join([*above, *beside])


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def _escaped(text: str) -> str:
    for mark in "\\|*_<>{}[]`":
        text = text.replace(mark, f"\\{mark}")
    return text
