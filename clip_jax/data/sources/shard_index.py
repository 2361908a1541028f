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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np
import pyarrow as pa
import tqdm
from etils import epath

from clip_jax.errors import UserError
from clip_jax.storage import locations, ranges, remote, writing
from clip_jax.storage.locations import Stat

_FORMAT = "1"  # of the file; another one is made anew
# Fewer shards than this are scanned in turn, since processes take a second to start.
_WORTH_PROCESSES = 16
_THREADS = 32  # of a process that scans shards in a bucket: mostly they wait


@dataclasses.dataclass(frozen=True)
class Found:
    """What a scan finds in a shard.

    Attributes:
      rows: one per example, of the dtype of the kind of shard.
      problems: number of what was left out or looks wrong, by reason.
      damage: why the shard could not be read to its end; "": it could.
      stat: of the file that was scanned; None: it was not there.
    """

    rows: np.ndarray
    problems: Mapping[str, int]
    damage: str = ""
    stat: Stat | None = None

    @property
    def version(self) -> int | str | None:
        """Of the file that was scanned; None: it was not there."""
        return self.stat.version if self.stat else None


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


def load(
    paths: Sequence[epath.Path],
    kind: Kind,
    fallback_dir: epath.Path | None = None,
    workers: int = 0,
    must_keep: bool = False,
) -> list[Found]:
    """The rows of each shard, from the stored index as far as it holds.

    Args:
      paths: of the shards. A missing or unreadable one is logged and has no rows.
      kind: of the shards.
      fallback_dir: directory for indices where that of the shards cannot be written to; None:
        they are not kept then.
      workers: processes that scan; 0: one per CPU core.
      must_keep: whether an index that cannot be written is an error.

    Raises:
      UserError: the index cannot be written, and must be.
    """
    folders: dict[epath.Path, list[epath.Path]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path)
    found: dict[epath.Path, Found] = {}
    for folder, members in folders.items():
        names = list(dict.fromkeys(path.name for path in members))
        index = _load_folder(folder, names, kind, fallback_dir, workers, must_keep)
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
    fallback_dir: epath.Path | None,
    workers: int,
    must_keep: bool,
) -> dict[str, Found]:
    places = _places(folder, kind, fallback_dir)
    *found, index = locations.stats([*(folder / name for name in names), places[0]])
    stats = dict(zip(names, found))
    stored = _Stored.read(places[0], index, kind)
    if stored is None and fallback_dir is not None:
        stored = _Stored.read(places[1], locations.stat(places[1]), kind)
    stored = stored or _Stored()
    fresh = {name: stored.shards[name] for name in names if stored.holds(name, stats[name])}
    todo = [name for name in names if name not in fresh]
    if stored.shards and todo:
        logging.warning(
            "The index of %s lacks %d of %d shards, or they have changed since: reading them anew",
            folder,
            len(todo),
            len(names),
        )
    scanned = dict(zip(todo, _scan_all([folder / name for name in todo], kind, workers)))
    scanned = {
        name: dataclasses.replace(shard, stat=stats[name]) for name, shard in scanned.items()
    }
    if changed := {name: shard for name, shard in scanned.items() if shard.stat is not None}:
        problem = _Stored({**stored.shards, **changed}).write(places, kind)
        if problem and must_keep:
            raise UserError(f"The index cannot be written: {problem}")
        if problem:
            logging.warning("The index of shards is not kept: %s", problem)
    return {**fresh, **scanned}


def _places(folder: epath.Path, kind: Kind, fallback_dir: epath.Path | None) -> list[epath.Path]:
    """Where the index of a directory may stand, the best place first."""
    places = [folder / f"clip_jax.{kind.name}.index"]
    if fallback_dir is not None:
        digest = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
        places.append(fallback_dir / f"{digest}.{kind.name}.index")
    return places


def _scan_all(paths: Sequence[epath.Path], kind: Kind, workers: int) -> Iterator[Found]:
    workers = workers or os.cpu_count() or 1
    if len(paths) < _WORTH_PROCESSES or workers == 1:
        yield from _scan_some(paths, kind)
        return
    # Processes, since headers are parsed under Python's lock; spawned, since JAX has threads.
    context = multiprocessing.get_context("spawn")
    each = _THREADS if remote.is_remote(paths[0]) else 4
    tasks = [paths[i : i + each] for i in range(0, len(paths), each)]
    every = 0.5 if sys.stderr.isatty() else 30.0  # seconds; a log wants few lines
    with (
        futures.ProcessPoolExecutor(workers, mp_context=context) as pool,
        tqdm.tqdm(
            desc="Indexing", total=len(paths), unit=" shards", leave=False, mininterval=every
        ) as bar,
    ):
        for found in pool.map(_scan_some, tasks, [kind] * len(tasks)):
            bar.update(len(found))
            yield from found


def _scan_some(paths: Sequence[epath.Path], kind: Kind) -> list[Found]:
    if not paths or not remote.is_remote(paths[0]):
        return [_scan(path, kind) for path in paths]
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(_scan, paths, [kind] * len(paths)))


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

    def holds(self, name: str, stat: Stat | None) -> bool:
        return stat is not None and name in self.shards and self.shards[name].stat == stat

    @classmethod
    def read(cls, path: epath.Path, stat: Stat | None, kind: Kind) -> "_Stored | None":
        """None where there is no index, or none of this form."""
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
            shards[name] = Found(own, problems, damage, Stat(size, version))
            first += count
        return cls(shards) if first == len(rows) else None

    def write(self, places: Sequence[epath.Path], kind: Kind) -> str:
        """Writes to the first place that can be written to; returns why there is none, or ""."""
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
    """A column of fixed-size binary values as rows, where they lie."""
    if not len(column):
        return np.empty(0, dtype)
    (chunk,) = column.chunks
    return np.frombuffer(chunk.buffers()[1], dtype)[chunk.offset : chunk.offset + len(chunk)]
