"""The identity of the training data, which a checkpoint keeps and several hosts compare.

It comes of what the index has read already: names, sizes and counts, in order. It does not depend
on where the data lie.
"""

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from clip_jax.data.mixture import Mixture
from clip_jax.data.sources.base import Source

# By name of the source: {"examples": count, "fingerprint": text, "files": names and sizes}.
Identity = Mapping[str, Mapping[str, Any]]

_KEPT_FILES = 2000  # more would make every checkpoint's description large
_AT_ONCE = 10_000  # files hashed in one piece
_NAMED = 5  # files in a message


def describe(data: ConfigDict, source: Source) -> Identity:
    """Describes the training data.

    Args:
      data: the fields of `data` in configs/default.py.
      source: what `mixture.create` opened by them.
    """
    parts = source.parts if isinstance(source, Mixture) else [source]
    names = list(data.mixture) or ["source"]
    return {name: _describe(part) for name, part in zip(names, parts, strict=True)}


def _describe(source: Source) -> dict[str, Any]:
    files: Iterable[str] = source.listing() if hasattr(source, "listing") else ()
    digest, kept, number = hashlib.sha256(), [], 0
    lines = iter(files)
    while some := list(itertools.islice(lines, _AT_ONCE)):
        digest.update("\n".join([*some, ""]).encode("utf-8", "surrogateescape"))
        kept += some[: max(_KEPT_FILES + 1 - len(kept), 0)]
        number += len(some)
    return {
        "examples": len(source),
        "fingerprint": f"{number} files {digest.hexdigest()[:32]}",
        "files": kept if number <= _KEPT_FILES else [],
    }


def differences(old: Identity, new: Identity, where: tuple[str, str]) -> list[str]:
    """Returns what differs between two identities, a clause for each source; none if equal.

    Args:
      old: the one.
      new: the other.
      where: words that tell them apart, such as "before" and "now".
    """
    if list(old) != list(new):
        return [f"sources {', '.join(old)} {where[0]}, {', '.join(new)} {where[1]}"]
    return [
        _difference(name, (old[name], new[name]), where)
        for name in new
        if _key(old[name]) != _key(new[name])
    ]


def _key(part: Mapping[str, Any]) -> tuple[int, str]:
    return part["examples"], part["fingerprint"]


def _difference(name: str, parts: Sequence[Mapping[str, Any]], where: tuple[str, str]) -> str:
    counts = (f"{part['examples']:,} examples {word}" for part, word in zip(parts, where))
    clauses = [f"{name} has {', '.join(counts)}"]
    before, after = (dict(_name_first(part["files"])) for part in parts)
    if before and after:
        for what, names in (
            (f"only {where[0]}", [file for file in before if file not in after]),
            (f"only {where[1]}", [file for file in after if file not in before]),
            ("changed", [f for f in after if f in before and after[f] != before[f]]),
        ):
            if names:
                more = ", ..." if len(names) > _NAMED else ""
                clauses.append(f"{len(names):,} {what} ({', '.join(names[:_NAMED])}{more})")
        if len(clauses) == 1:
            clauses.append("the same files in another order")
    return ", ".join(clauses)


def _name_first(files: Sequence[str]) -> Iterable[tuple[str, str]]:
    for file in files:
        name, _, rest = file.partition("\t")
        yield name, rest
