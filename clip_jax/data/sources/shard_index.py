"""The index of a set of shards, with the place of every example: made once, kept in a file.

The file is an Arrow table of fixed-size rows, mapped into memory: a set of a billion examples is
opened without reading it. It lists the shards of one directory with their sizes and modification
times; a shard that has changed since is scanned again, the others are not.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath

from clip_jax.common import processes
from clip_jax.errors import UserError
from clip_jax.storage import locations, ranges, remote, writing
from clip_jax.storage.locations import Stat

_FORMAT = "2"  # format of the file; a file of another format is made anew
# Fewer shards than this are scanned in this process, since processes take a second to start.
_WORTH_PROCESSES = 16
_KEEP_EVERY = 1.0  # seconds at least between two writes of an index that is being made
_PAUSE = 20  # the same in durations of a write, which is long for large sets
_THREADS = 32  # threads of a process that scans shards in a bucket: mostly they wait


@dataclasses.dataclass(frozen=True)
class ScanResult:
    """The examples of a shard.

    Attributes:
      rows: one per example, with the dtype of the kind of shard.
      problems: number of files that were left out or look wrong, by reason.
      damage: reason why the shard could not be read to its end; "": it could.
      stat: size and version of the file that was scanned; None: it was not there.
    """

    rows: np.ndarray
    problems: Mapping[str, int]
    damage: str = ""
    stat: Stat | None = None

    @property
    def version(self) -> int | str | None:
        """The version of the file that was scanned; None: it was not there."""
        return self.stat.version if self.stat else None


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of shard.

    Attributes:
      name: name of the kind, part of the index's file name.
      dtype: dtype of a row.
      scan: finds the rows of a shard; raises FileNotFoundError or OSError. At module level, since
        other processes call it.
    """

    name: str
    dtype: np.dtype
    scan: Callable[[epath.Path], ScanResult]


def load(
    paths: Sequence[epath.Path],
    kind: Kind,
    fallback_dir: epath.Path | None = None,
    workers: int = 0,
    must_keep: bool = False,
) -> list[ScanResult]:
    """Returns the rows of each shard, from the stored index as far as it is valid.

    Args:
      paths: the shards. A missing or unreadable one is logged and has no rows.
      kind: kind of the shards.
      fallback_dir: directory for indices where that of the shards cannot be written to; None:
        they are not kept then.
      workers: number of processes that scan; 0: one per CPU core.
      must_keep: whether an index that cannot be written is an error.

    Raises:
      UserError: the index cannot be written, and must be.
    """
    folders: dict[epath.Path, list[epath.Path]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path)
    found: dict[epath.Path, ScanResult] = {}
    for folder, members in folders.items():
        names = list(dict.fromkeys(path.name for path in members))
        index = _load_folder(folder, names, kind, fallback_dir, workers, must_keep)
        found |= {folder / name: index[name] for name in names}
    for path in dict.fromkeys(paths):
        if damage := found[path].damage:
            logging.warning("Damaged shard %s, its whole examples are used: %s", path, damage)
    return [found[path] for path in paths]


def listing(
    paths: Sequence[epath.Path], found: Sequence[ScanResult], counts: Sequence[int]
) -> list[str]:
    """Lists shards by name below their common directory, with size and count of examples."""
    parts = [str(path).split("/") for path in paths]
    columns = zip(*(each[:-1] for each in parts))
    common = len(list(itertools.takewhile(lambda column: len(set(column)) == 1, columns)))
    return [
        f"{'/'.join(each[common:])}\t{shard.stat.size if shard.stat else 0} bytes, {count} examples"
        for each, shard, count in zip(parts, found, counts, strict=True)
    ]


def count_problems(found: Sequence[ScanResult]) -> Counter[str]:
    """Counts the problems of shards by reason, damaged shards included."""
    total: Counter[str] = Counter()
    for shard in found:
        total.update(shard.problems)
        total["damaged shard"] += bool(shard.damage)
    return +total


def _load_folder(
    folder: epath.Path,
    names: Sequence[str],
    kind: Kind,
    fallback_dir: epath.Path | None,
    workers: int,
    must_keep: bool,
) -> dict[str, ScanResult]:
    places = _places(folder, kind, fallback_dir)
    *found, index = locations.stats([*(folder / name for name in names), places[0]])
    stats = dict(zip(names, found))
    stored = _IndexFile.read(places[0], index, kind)
    if stored is None and fallback_dir is not None:
        stored = _IndexFile.read(places[1], locations.stat(places[1]), kind)
    stored = stored or _IndexFile()
    fresh = {name: stored.shards[name] for name in names if stored.holds(name, stats[name])}
    todo = [name for name in names if name not in fresh]
    if stored.shards and todo:
        logging.warning(
            "The index of %s lacks %d of %d shards, or they have changed since: reading them, and "
            "keeping the others",
            folder,
            len(todo),
            len(names),
        )
    scanned: dict[str, ScanResult] = {}
    problem, kept, due = "", 0, time.monotonic() + _KEEP_EVERY
    for name, shard in zip(todo, _scan_all([folder / name for name in todo], kind, workers)):
        scanned[name] = dataclasses.replace(shard, stat=stats[name])
        # Kept as it is made, so that an interruption costs little.
        if time.monotonic() > due and not problem:
            began, kept = time.monotonic(), len(scanned)
            problem = _keep(stored, scanned, places, kind)
            due = time.monotonic() + max(_KEEP_EVERY, _PAUSE * (time.monotonic() - began))
    if len(scanned) > kept and not problem:
        problem = _keep(stored, scanned, places, kind)
    if problem and must_keep:
        raise UserError(f"The index cannot be written: {problem}")
    if problem:
        logging.warning("The index of shards is not kept: %s", problem)
    return {**fresh, **scanned}


def _keep(
    stored: "_IndexFile",
    scanned: Mapping[str, ScanResult],
    places: Sequence[epath.Path],
    kind: Kind,
) -> str:
    """Writes the index with what has been scanned so far; returns the errors, else ""."""
    changed = {name: shard for name, shard in scanned.items() if shard.stat is not None}
    return _IndexFile({**stored.shards, **changed}).write(places, kind) if changed else ""


def _places(folder: epath.Path, kind: Kind, fallback_dir: epath.Path | None) -> list[epath.Path]:
    """The possible places of the index of a directory, the best one first."""
    places = [folder / f"clip_jax.{kind.name}.index"]
    if fallback_dir is not None:
        digest = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
        places.append(fallback_dir / f"{digest}.{kind.name}.index")
    return places


def _scan_all(paths: Sequence[epath.Path], kind: Kind, workers: int) -> Iterator[ScanResult]:
    workers = processes.count(workers)
    if not paths:
        return
    if len(paths) < _WORTH_PROCESSES or workers == 1:
        each = _THREADS if remote.is_remote(paths[0]) else 1
        for first in range(0, len(paths), each):
            yield from _scan_some(kind, paths[first : first + each])
        return
    # Processes, since headers are parsed under the GIL.
    each = _THREADS if remote.is_remote(paths[0]) else 4
    parts = [paths[i : i + each] for i in range(0, len(paths), each)]
    scan = functools.partial(_scan_some, kind)
    with processes.progress("Indexing", len(paths), " shards", leave=False) as bar:
        remark = "Make the index first: python -m clip_jax data index DATA --workers=1."
        for found in processes.map_in_order(scan, parts, workers, remark=remark):
            bar.update(len(found))
            yield from found


def _scan_some(kind: Kind, paths: Sequence[epath.Path]) -> list[ScanResult]:
    if not paths or not remote.is_remote(paths[0]):
        return [_scan(path, kind) for path in paths]
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(_scan, paths, [kind] * len(paths)))


def _scan(path: epath.Path, kind: Kind) -> ScanResult:
    nothing = np.empty(0, kind.dtype)
    try:
        return kind.scan(path)
    except FileNotFoundError:
        return ScanResult(nothing, {}, "there is no such file")
    except Exception as error:  # a hostile file must not end the run
        return ScanResult(nothing, {}, str(error) or type(error).__name__)


@dataclasses.dataclass(frozen=True)
class _IndexFile:
    """The contents of an index file."""

    shards: Mapping[str, ScanResult] = dataclasses.field(default_factory=dict)

    def holds(self, name: str, stat: Stat | None) -> bool:
        return stat is not None and name in self.shards and self.shards[name].stat == stat

    @classmethod
    def read(cls, path: epath.Path, stat: Stat | None, kind: Kind) -> "_IndexFile | None":
        """Reads an index; None where there is none, or none of this format."""
        if stat is None:
            return None
        copy = ranges.local_copy(path, stat)
        try:
            table = pa.ipc.open_file(pa.memory_map(str(copy))).read_all()
            about = json.loads(table.schema.metadata[b"clip_jax"])
            if about["format"] != _FORMAT:
                return None
            rows = _view(table.column("row"), kind.dtype)
        except (OSError, KeyError, ValueError, TypeError, pa.ArrowException):
            return None
        shards, first = {}, 0
        for name, size, version, count, problems, damage in about["shards"]:
            own = rows[first : first + count]
            shards[name] = ScanResult(own, problems, damage, Stat(size, version))
            first += count
        return cls(shards) if first == len(rows) else None

    def write(self, places: Sequence[epath.Path], kind: Kind) -> str:
        """Writes to the first writable place; returns the errors where there is none, else ""."""
        listed = [
            (name, *shard.stat, len(shard.rows), dict(shard.problems), shard.damage)
            for name, shard in self.shards.items()
            if shard.stat is not None
        ]
        about = {"clip_jax": json.dumps({"format": _FORMAT, "shards": listed})}
        schema = pa.schema([("row", pa.binary(kind.dtype.itemsize))], metadata=about)
        rows = np.concatenate([shard.rows for shard in self.shards.values()])
        column = pa.Array.from_buffers(
            schema.field("row").type, len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows))]
        )
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, schema) as writer:
            writer.write(pa.record_batch([column], schema=schema))
        contents = sink.getvalue().to_pybytes()
        errors = []
        for place in places:
            try:
                writing.write(place, contents)
                return ""
            except Exception as error:  # each kind of storage has its own
                errors.append(str(error))
        return "; ".join(errors)


def _view(column: Any, dtype: np.dtype) -> np.ndarray:
    """Returns a column of fixed-size binary values as rows, without a copy."""
    if not len(column):
        return np.empty(0, dtype)
    (chunk,) = column.chunks
    return np.frombuffer(chunk.buffers()[1], dtype)[chunk.offset : chunk.offset + len(chunk)]
