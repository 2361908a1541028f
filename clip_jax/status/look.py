"""The look of text: width, colours and characters, as where it is shown can have them."""

import dataclasses
import os
import re
import shutil
import textwrap
import unicodedata
from collections.abc import Mapping
from typing import TextIO

_LEAST, _MOST = 60, 400  # columns that are used
_PLAIN = 100  # columns where nobody tells
_SERIES = ("34", "33", "32", "35", "36", "31")  # colours by position, as codes of ANSI terminals
_NAMED = {"good": "32", "bad": "31;1", "warn": "33", "soft": "2", "strong": "1"}
_ASCII = {0xA0: " ", 0x2013: "-", 0x2026: "...", 0xD7: "x"}
_CODE = re.compile(r"\x1b\[[0-9;]*m")


@dataclasses.dataclass(frozen=True)
class Look:
    """The look of text.

    Attributes:
      width: columns.
      colour: whether the codes of ANSI terminals are understood and wanted.
      unicode: whether other characters than ASCII can be shown.
    """

    width: int
    colour: bool
    unicode: bool

    def paint(self, text: str, colour: int | str) -> str:
        """Colours text by the position of a series, or by the name of a role."""
        if not self.colour or not text:
            return text
        code = _NAMED[colour] if isinstance(colour, str) else _SERIES[colour % len(_SERIES)]
        return f"\x1b[{code}m{text}\x1b[0m"

    def pad(self, text: str, width: int) -> str:
        """Fills a line, which may be coloured, with spaces."""
        return text + " " * (width - len(_CODE.sub("", text)))

    def shown(self, text: str) -> str:
        """Returns text with such characters only as can be shown."""
        if self.unicode:
            return text.encode("utf-8", "replace").decode()
        return text.translate(_ASCII).encode("ascii", "replace").decode()

    def resized(self, width: int) -> "Look":
        """Returns the same look for fewer columns."""
        return dataclasses.replace(self, width=width)

    def wrap(self, text: str, indent: int = 2) -> list[str]:
        """Breaks a paragraph into lines."""
        space = " " * indent
        return textwrap.wrap(
            plain(text),
            self.width,
            initial_indent=space,
            subsequent_indent=space,
            break_on_hyphens=False,
        )


def of_stream(stream: TextIO, environment: Mapping[str, str] = os.environ) -> Look:
    """Returns the look that suits a stream: plain where it is no terminal, or NO_COLOR is set."""
    terminal = stream.isatty()
    width = shutil.get_terminal_size((_PLAIN, 24)).columns if terminal else _PLAIN
    if (columns := environment.get("COLUMNS", "")).isdecimal() and int(columns[:9]):
        width = int(columns[:9])
    width = min(max(_LEAST, width), _MOST)
    colour = terminal and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"
    try:
        "█⣿│–×".encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return Look(width, colour, unicode=False)
    return Look(width, colour, unicode=True)


def plain(text: str) -> str:
    """Returns text in one line without control characters, which a terminal would obey."""
    return " ".join("".join(" " if unicodedata.category(c)[0] == "C" else c for c in text).split())
