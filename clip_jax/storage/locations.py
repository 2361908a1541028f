"""Paths as users type them: local, gs:// or s3://, patterns, brace ranges, lists."""

import fnmatch
import os
import pathlib
import re
from collections.abc import Sequence
from concurrent import futures
from typing import Any, NamedTuple

from etils import epath

from clip_jax.errors import UserError
from clip_jax.storage import faults, remote

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_COMMA = re.compile(r",(?![^{}]*\})")  # outside of braces
_MAGIC = re.compile(r"[*?\[]")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://?")

_STAT_THREADS = 32
# Up to this number of objects of one prefix are looked up one by one, more by listing it.
_FEW = 8


class Stat(NamedTuple):
    """The identity of a file's contents.

    Attributes:
      size: size in bytes.
      version: changes whenever the contents do: modification time (ns) of a local file, generation
        (gs://) or ETag (s3://) of an object.
    """

    size: int
    version: int | str


def parse(text: epath.PathLike) -> epath.Path:
    """Returns the path that a user typed; ~ is the home directory.

    Raises:
      UserError: paths of its kind are not supported, such as https://.
    """
    name = os.fspath(text)
    if (problem := _problem(name)) and not os.path.lexists(name):
        raise UserError(
            f"{name!r} cannot be used: {problem}. Paths are local, gs://BUCKET/... or "
            "s3://BUCKET/...; several are separated by commas, and may have patterns and ranges "
            "such as {00000..00099}."
        )
    if name.startswith("gs://"):
        faults.patch_gcsfs()
    return epath.Path(name).expanduser()


def reachable(text: epath.PathLike) -> epath.Path:
    """Returns the path that a user typed, for results that are written there later.

    Raises:
      UserError: paths of its kind are not supported, or its bucket is not there.
    """
    path = parse(text)
    if remote.is_remote(path):
        check_bucket(path)
    return path


def _problem(name: str) -> str:
    if name.startswith("pipe:"):
        return "output of a command (pipe:) is not read"
    if "::" in name:
        return "a list is written with commas, not with ::"
    match = _URL.match(name)
    if match is None:
        return ""
    scheme = match[1]
    if scheme == "file":
        return "a local path is written without file:"
    if scheme not in remote.SCHEMES:
        return f"{scheme}:// is not read; download the files first"
    if not name.startswith(f"{scheme}://"):
        return f"after {scheme}: there must be two slashes"
    return "" if remote.split(name)[1] else "it names no bucket"


def expand(paths: str, suffix: str) -> list[epath.Path]:
    """Returns the files that a comma-separated list names.

    Args:
      paths: files, directories (their files ending in `suffix`), patterns with * ? [ ], and
        braces such as "{00000..00012}" and "{train,val}"; local, gs:// or s3://.
      suffix: ending of names, such as ".tar".

    Returns:
      For directories and patterns the existing files, sorted within each. Files that are named
      outright or by brace ranges are returned whether they exist or not.
    """
    found = []
    for item in filter(None, (item.strip() for item in _COMMA.split(paths))):
        for name in _expand_braces(item):
            found += _expand_pattern(name, suffix)
    return found


def _expand_braces(name: str) -> list[str]:
    match = _BRACES.search(name)
    if match is None:
        return [name]
    first, last, listed = match.groups()
    if listed is None:
        choices = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    else:
        choices = listed.split(",")
    before, after = name[: match.start()], name[match.end() :]
    return [full for choice in choices for full in _expand_braces(before + choice + after)]


def _expand_pattern(name: str, suffix: str) -> list[epath.Path]:
    path = parse(name)
    if _MAGIC.search(name):
        parts = path.parts
        first = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
        root, pattern = epath.Path(*parts[:first]), "/".join(parts[first:])
        if remote.is_remote(path) and "/" not in pattern:
            return [root / name for name in sorted(listing(root)) if fnmatch.fnmatch(name, pattern)]
        return sorted(faults.repeat(lambda: list(root.glob(pattern)), root))
    if path.suffix == suffix:  # saves one of two requests for a file named outright
        return [path] if remote.is_remote(path) or not path.is_dir() else _inside(path, suffix)
    return _inside(path, suffix) if faults.repeat(path.is_dir, path) else [path]


def _inside(folder: epath.Path, suffix: str) -> list[epath.Path]:
    return [folder / name for name in sorted(listing(folder)) if name.endswith(suffix)]


def short_names(paths: Sequence[epath.Path]) -> list[str]:
    """Returns a name for each file, with directories only where two would have the same name."""
    texts = list(map(os.fspath, paths))
    names = [text.rpartition("/")[2] for text in texts]
    if len(set(names)) == len(set(texts)):
        return names
    folders = [text.split("/")[:-1] for text in texts]
    # The first and the last in order have in common what all have.
    first, last = min(folders), max(folders)
    depth = next((i for i, pair in enumerate(zip(first, last)) if len(set(pair)) > 1), len(first))
    return ["/".join(text.split("/")[depth:]) for text in texts]


def listing(folder: epath.Path) -> dict[str, Stat]:
    """Lists the files of a directory, or directly below a prefix, by name; may be empty."""
    if not remote.is_remote(folder):
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if _is_file(entry)]
        found = {name: stat(folder / name) for name in names}
        return {name: each for name, each in found.items() if each is not None}

    def ask() -> list[dict[str, Any]]:
        try:
            return remote.filesystem(folder).ls(os.fspath(folder), detail=True)
        except FileNotFoundError:
            check_bucket(folder)
            return []

    return {
        info["name"].rpartition("/")[2]: _remote_stat(info)
        for info in faults.repeat(ask, folder)
        if info["type"] == "file"
    }


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself
        return False


def tree(root: epath.Path) -> list[str]:
    """Lists all files under a directory or prefix, relative to it, sorted."""
    if not remote.is_remote(root):
        return sorted(
            f"{folder.relative_to(root).as_posix()}/{name}".removeprefix("./")
            for folder, _, names in root.walk()
            for name in names
        )
    prefix = os.fspath(root).partition("://")[2].rstrip("/") + "/"
    found = faults.repeat(lambda: remote.filesystem(root).find(os.fspath(root)), root)
    return sorted(name.removeprefix(prefix) for name in found)


def stats(paths: Sequence[epath.Path]) -> list[Stat | None]:
    """Returns size and version of each file, None: it is not there; in few requests."""
    by_folder: dict[epath.Path, list[epath.Path]] = {}
    for path in paths:
        by_folder.setdefault(path.parent, []).append(path)
    found: dict[epath.Path, Stat | None] = {}
    for folder, members in by_folder.items():
        if remote.is_remote(folder) and len(members) > _FEW:
            there = listing(folder)
            found |= {path: there.get(path.name) for path in members}
        else:
            with futures.ThreadPoolExecutor(_STAT_THREADS) as pool:
                found |= zip(members, pool.map(stat, members))
    return [found[path] for path in paths]


def stat(path: epath.Path) -> Stat | None:
    """Returns size and version of one file; None: it is not there."""
    try:
        if not remote.is_remote(path):
            return _local_stat(path)
        return faults.repeat(lambda: _remote_stat(_describe(path)), path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:  # a path with a NUL
        return None


def _describe(path: epath.Path) -> dict[str, Any]:
    """Requests the metadata of an object, once; gcsfs would ask for a prefix too."""
    scheme, bucket, key = remote.split(path)
    client = remote.filesystem(path)
    if scheme == "gs":
        return client.call("GET", "b/{}/o/{}", bucket, key, json_out=True)
    info = client.info(os.fspath(path))
    if info["type"] != "file":
        raise FileNotFoundError(f"{path} is no object")
    return info


def _local_stat(path: epath.PathLike) -> Stat:
    found = os.stat(path)
    return Stat(found.st_size, found.st_mtime_ns)


def _remote_stat(info: dict[str, Any]) -> Stat:
    version = info.get("generation") or info.get("ETag") or info.get("mtime")
    return Stat(int(info["size"]), str(version).strip('"'))


def check_bucket(path: epath.Path) -> None:
    """Checks that a bucket exists and that the path in it may be listed.

    The request lists one object, since rights on objects do not include the bucket itself.

    Raises:
      UserError: it does not, or may not.
    """
    scheme, bucket, key = remote.split(path)
    client = remote.filesystem(path)
    try:
        if scheme == "gs":
            client.call("GET", "b/{}/o", bucket, prefix=key, maxResults=1, json_out=True)
        else:
            client.call_s3("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)
    except Exception as error:
        if faults.is_failure(error):
            raise UserError(faults.explain(error, path)) from error
        raise


def inside(folder: epath.Path, name: Any) -> epath.Path:
    """Returns a file of a folder by its name, which may come from a stranger.

    Raises:
      UserError: it is another place's: a path with "..", an absolute one, or a link out of there.
    """
    parts = pathlib.PurePosixPath(name).parts if isinstance(name, str) else ()
    plain = parts and not {"..", "/"} & set(parts) and not re.search(r"[\\:\0]", name)
    if plain and not remote.is_remote(folder):
        root = pathlib.Path(folder)
        # A snapshot of the hub links to the blobs beside it, within the cache of that model.
        if root.parent.name == "snapshots":
            root = root.parent.parent
        plain = (pathlib.Path(folder) / name).resolve().is_relative_to(root.resolve())
    if not plain:
        raise UserError(
            f"{folder} names the file {name!r}, which is not inside of it: such a model may not "
            "choose what is read here. Copy the file into the folder and name it without a path."
        )
    return folder / name
