"""Where every example of a set of shards stands: found once, in parallel, and kept in a file.

The file is an Arrow table of fixed-size rows, mapped into memory: a set of a billion examples is
opened without reading it. It lists the shards of one directory with their sizes and modification
times; a shard that has changed since is scanned again, the others are not.
"""

import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np
import pyarrow as pa
import tqdm
from etils import epath

_FORMAT = "1"  # of the file; another one is made anew
_STAT_THREADS = 32
# Fewer shards than this are scanned in turn, since processes take a second to start.
_WORTH_PROCESSES = 16


@dataclasses.dataclass(frozen=True)
class Found:
    """What a scan finds in a shard.

    Attributes:
      rows: one per example, of the dtype of the kind of shard.
      problems: number of what was left out or looks wrong, by reason.
      damage: why the shard could not be read to its end; "": it could.
    """

    rows: np.ndarray
    problems: Mapping[str, int]
    damage: str = ""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of shard.

    Attributes:
      name: of the kind, part of the file's name.
      dtype: of a row.
      scan: finds the rows of a shard; raises FileNotFoundError or OSError. At module level, since
        other processes call it.
    """

    name: str
    dtype: np.dtype
    scan: Callable[[epath.Path], Found]


# Size in bytes and modification time (in ns, or s from remote storage).
_Stamp = tuple[int, int]


def load(
    paths: Sequence[epath.Path],
    kind: Kind,
    spare: epath.Path | None = None,
    workers: int = 0,
) -> list[Found]:
    """The rows of each shard, from the stored index as far as it holds.

    Args:
      paths: of the shards. A missing or unreadable one is logged and has no rows.
      kind: of the shards.
      spare: directory for indices where that of the shards cannot be written to; None: they are
        not kept then.
      workers: processes that scan; 0: one per CPU core.
    """
    folders: dict[epath.Path, list[epath.Path]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path)
    found: dict[epath.Path, Found] = {}
    for folder, members in folders.items():
        names = list(dict.fromkeys(path.name for path in members))
        index = _load_folder(folder, names, kind, spare, workers)
        found |= {folder / name: index[name] for name in names}
    for path in dict.fromkeys(paths):
        if damage := found[path].damage:
            logging.warning("Damaged shard %s, its whole examples are used: %s", path, damage)
    return [found[path] for path in paths]


def count_problems(found: Sequence[Found]) -> Counter[str]:
    """What is wrong with shards, by reason, damaged ones included."""
    total: Counter[str] = Counter()
    for shard in found:
        total.update(shard.problems)
        total["damaged shard"] += bool(shard.damage)
    return +total


def _load_folder(
    folder: epath.Path,
    names: Sequence[str],
    kind: Kind,
    spare: epath.Path | None,
    workers: int,
) -> dict[str, Found]:
    with futures.ThreadPoolExecutor(_STAT_THREADS) as pool:
        stamps = dict(zip(names, pool.map(lambda name: _stamp(folder / name), names)))
    places = _places(folder, kind, spare)
    stored = next((index for index in map(_Stored.read, places, [kind] * 2) if index), _Stored())
    fresh = {name: stored.shards[name] for name in names if stored.holds(name, stamps[name])}
    todo = [name for name in names if name not in fresh]
    scanned = dict(zip(todo, _scan_all([folder / name for name in todo], kind, workers)))
    changed = {name: stamp for name in todo if (stamp := stamps[name]) is not None}
    if changed:
        shards = {**stored.shards, **{name: scanned[name] for name in changed}}
        _Stored(shards, {**stored.stamps, **changed}).write(places, kind)
    return {**fresh, **scanned}


def _stamp(path: epath.Path) -> _Stamp | None:
    """Size and time of a file, None: it is not there."""
    try:
        if "://" in str(path):
            remote = path.stat()
            return remote.length, remote.mtime
        local = os.stat(path)
        return local.st_size, local.st_mtime_ns
    except Exception:  # each kind of storage has its own
        return None


def _places(folder: epath.Path, kind: Kind, spare: epath.Path | None) -> list[epath.Path]:
    """Where the index of a directory may stand, the best place first."""
    places = [folder / f"clip_jax.{kind.name}.index"]
    if spare is not None:
        digest = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
        places.append(spare / f"{digest}.{kind.name}.index")
    return places


def _scan_all(paths: Sequence[epath.Path], kind: Kind, workers: int) -> Iterator[Found]:
    workers = workers or os.cpu_count() or 1
    if len(paths) < _WORTH_PROCESSES or workers == 1:
        yield from (_scan(path, kind) for path in paths)
        return
    # Processes, since headers are parsed under Python's lock; spawned, since JAX has threads.
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        results = pool.map(_scan, paths, [kind] * len(paths), chunksize=4)
        every = 0.5 if sys.stderr.isatty() else 30.0  # seconds; a log wants few lines
        about = {"total": len(paths), "unit": " shards", "leave": False, "mininterval": every}
        yield from tqdm.tqdm(results, "Indexing", **about)


def _scan(path: epath.Path, kind: Kind) -> Found:
    nothing = np.empty(0, kind.dtype)
    try:
        return kind.scan(path)
    except FileNotFoundError:
        return Found(nothing, {}, "there is no such file")
    except OSError as error:
        return Found(nothing, {}, str(error))


@dataclasses.dataclass(frozen=True)
class _Stored:
    """The contents of an index file."""

    shards: Mapping[str, Found] = dataclasses.field(default_factory=dict)
    stamps: Mapping[str, _Stamp] = dataclasses.field(default_factory=dict)

    def holds(self, name: str, stamp: _Stamp | None) -> bool:
        return stamp is not None and self.stamps.get(name) == stamp

    @classmethod
    def read(cls, path: epath.Path, kind: Kind) -> "_Stored | None":
        """None where there is no index, or none of this form."""
        try:
            remote = "://" in str(path)
            source = pa.BufferReader(path.read_bytes()) if remote else pa.memory_map(str(path))
            table = pa.ipc.open_file(source).read_all()
            about = json.loads(table.schema.metadata[b"clip_jax"])
            if about["format"] != _FORMAT:
                return None
            rows = _view(table.column("row"), kind.dtype)
        except (OSError, KeyError, ValueError, TypeError, pa.ArrowException):
            return None
        shards, stamps, first = {}, {}, 0
        for name, *stamp, count, problems, damage in about["shards"]:
            shards[name] = Found(rows[first : first + count], problems, damage)
            stamps[name] = tuple(stamp)
            first += count
        return cls(shards, stamps) if first == len(rows) else None

    def write(self, places: Sequence[epath.Path], kind: Kind) -> None:
        """Writes to the first place that can be written to."""
        listed = [
            (name, *self.stamps[name], len(shard.rows), dict(shard.problems), shard.damage)
            for name, shard in self.shards.items()
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
        contents = sink.getvalue()
        errors = []
        for place in places:
            try:
                _replace(place, contents)
                return
            except Exception as error:  # each kind of storage has its own
                errors.append(str(error))
        logging.warning("The index of shards is not kept: %s", "; ".join(errors))


def _view(column: Any, dtype: np.dtype) -> np.ndarray:
    """A column of fixed-size binary values as rows, where they lie."""
    if not len(column):
        return np.empty(0, dtype)
    (chunk,) = column.chunks
    return np.frombuffer(chunk.buffers()[1], dtype)[chunk.offset : chunk.offset + len(chunk)]


def _replace(path: epath.Path, contents: Any) -> None:
    """Writes a file whole or not at all; several hosts may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        with partial.open("wb") as file:
            file.write(contents)
        partial.replace(path)
    except Exception:
        partial.unlink(missing_ok=True)
        raise
