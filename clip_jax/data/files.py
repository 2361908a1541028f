"""Paths as users type them: local or gs://, patterns, brace ranges, lists."""

import re
import time
from collections.abc import Callable, Sequence
from typing import IO, TypeVar

from etils import epath

from clip_jax.errors import BadExample

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAGIC = re.compile(r"[*?\[]")
# Seconds to wait before each further try at a read that failed.
RETRY_DELAYS = (0.1, 0.5, 2.0)

# Bytes between two spans up to which reading on is cheaper than jumping.
_GAP = 2**16

Result = TypeVar("Result")


def expand(paths: str, suffix: str) -> list[epath.Path]:
    """The files that a comma-separated list names.

    Args:
      paths: of files, directories (their files ending in `suffix`), patterns with * ? [ ], and
        brace ranges such as "{00000..00012}"; local or gs://.
      suffix: such as ".tar".

    Returns:
      Existing files for directories and patterns, sorted within each; files named outright and
      by brace ranges whether they exist or not.
    """
    found = []
    for item in filter(None, (item.strip() for item in paths.split(","))):
        for name in _expand_range(item):
            found += _expand_pattern(name, suffix)
    return found


def _expand_range(name: str) -> list[str]:
    match = _RANGE.search(name)
    if match is None:
        return [name]
    first, last = match.groups()
    return [
        expanded
        for number in range(int(first), int(last) + 1)
        for expanded in _expand_range(_RANGE.sub(f"{number:0{len(first)}}", name, count=1))
    ]


def _expand_pattern(name: str, suffix: str) -> list[epath.Path]:
    path = epath.Path(name).expanduser()
    if _MAGIC.search(name):
        parts = path.parts
        first = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
        return sorted(epath.Path(*parts[:first]).glob("/".join(parts[first:])))
    if path.is_dir():
        return sorted(path.glob(f"*{suffix}"))
    return [path]


def with_retries(read: Callable[[], Result], delays: Sequence[float]) -> Result:
    """The result of `read`, tried again after each of `delays` (seconds) where storage fails.

    BadExample is raised at once; otherwise the last error, of whatever kind the file system
    behind the path raises.
    """
    for delay in delays:
        try:
            return read()
        except BadExample:
            raise
        except Exception:
            time.sleep(delay)
    return read()


def read_spans(file: IO[bytes], spans: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes of each (offset, size), cut short where the file ends; neighbours by one read."""
    found = [b""] * len(spans)
    order = sorted(range(len(spans)), key=lambda i: spans[i])
    while order:
        start, size = spans[order[0]]
        end, count = start + size, 1
        while count < len(order) and spans[order[count]][0] <= end + _GAP:
            offset, size = spans[order[count]]
            end, count = max(end, offset + size), count + 1
        file.seek(start)
        data = file.read(end - start)
        for i in order[:count]:
            offset, size = spans[i]
            found[i] = data[offset - start : offset - start + size]
        order = order[count:]
    return found
