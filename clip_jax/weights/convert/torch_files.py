"""PyTorch's .pt files, read and written without PyTorch; nothing in them is executed.

Such a file is a zip archive: data.pkl is a pickle that describes the tensors, data/0, data/1, ...
hold their numbers. TorchScript archives have code besides, which is left alone. The pickle may
name nothing but the few types below; one that names another, as a harmful one must, is refused.
"""

import collections
import io
import itertools
import math
import mmap
import pickle
import struct
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from clip_jax.errors import UserError
from clip_jax.weights.folder import local_file
from clip_jax.weights.model import Tensors

_DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_MAX_ENTRIES = 1_000_000  # of a state dict
_MAX_INFLATION = 16
_LOCAL_HEADER = struct.Struct("<26xHH")  # lengths of a zip entry's name and extra field


class _Module:
    """Stands for any TorchScript class: only its attributes are of interest."""


@dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    key: str


@dataclass(frozen=True)
class _Stored:
    """A tensor not yet read: offset and strides in numbers, not bytes."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild(storage, offset, shape, strides, *_: Any) -> _Stored:
    return _Stored(storage, int(offset), tuple(shape), tuple(strides))


_KNOWN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    **{
        ("torch.jit._pickle", f"build_{kind}list"): list
        for kind in ("int", "bool", "double", "tensor")
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module.startswith("__torch__"):
            return _Module
        raise UserError(
            f"The file holds more than weights: its pickle asks for {module}.{name}, which could "
            "run code. Take the model's safetensors file; or, if you trust the file, load it in "
            "PyTorch and save its state_dict() alone."
        )

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, *_ = pid
        return _Storage(dtype, str(key))


@dataclass(frozen=True)
class TorchFile:
    """The content of a .pt file.

    Attributes:
      tensors: float32, by their names in the state dict.
      code: text of a TorchScript archive; "": it is a plain file.
    """

    tensors: Tensors
    code: str


def read(path: epath.Path) -> TorchFile:
    """Opens a state dict, a training checkpoint that holds one, or a TorchScript archive.

    Raises:
      UserError: it is damaged, in PyTorch's format before 1.6, or its pickle names other types.
    """
    local = local_file(path)
    try:
        with zipfile.ZipFile(local) as archive:
            pickled = next(n for n in archive.namelist() if n.split("/")[1:] == ["data.pkl"])
            root = pickled.removesuffix("data.pkl")
            check_inflation(archive.filelist, local.stat().st_size)
            tree = _Unpickler(io.BytesIO(archive.read(pickled))).load()
            starts = {info.filename.removeprefix(f"{root}data/"): info for info in archive.filelist}
            names = [n for n in archive.namelist() if n.endswith(".py")]
            code = "\n".join(archive.read(name).decode("utf-8", "replace") for name in names)
        stored = dict(_flat(_state_dict(tree)))
        return TorchFile(_open(path, local, stored, starts), code)
    except UserError as error:
        raise UserError(f"{path} is refused. {error}") from error
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{path} is no file of PyTorch 1.6 or later, or it is cut short. If it is older, load "
            "it there with weights_only=True, and save its state_dict() again."
        ) from error
    except Exception as error:  # whatever a damaged pickle makes of the unpickler
        raise UserError(
            f"{path} cannot be read as weights of PyTorch ({type(error).__name__}: {error}). "
            "Copy it again, or take the model's safetensors file."
        ) from error


def check_inflation(entries: Sequence[zipfile.ZipInfo], size: int) -> None:
    """Raises UserError if the members of an archive of `size` bytes are absurdly larger than it.

    Weights hardly shrink when they are compressed.
    """
    inflated = sum(entry.file_size for entry in entries)
    if inflated > _MAX_INFLATION * size + 2**26:
        raise UserError(
            f"Its {size:,} bytes claim to hold {inflated:,}, which weights never do: it would fill "
            "the memory. Take it from its first source."
        )


def _state_dict(tree: Any) -> Any:
    """Returns the model, the whole or a part of a training checkpoint."""
    inner = tree.get("state_dict") if isinstance(tree, dict) else None
    return tree if inner is None else inner


def _flat(
    tree: Any, prefix: str = "", visited: Iterator[int] | None = None
) -> Iterator[tuple[str, _Stored]]:
    visited = itertools.count() if visited is None else visited
    items = tree.items() if isinstance(tree, dict) else vars(tree).items()
    for name, value in items:
        if next(visited) > _MAX_ENTRIES:  # dictionaries that hold each other many times
            raise UserError(f"It holds more than {_MAX_ENTRIES:,} entries, which no model has.")
        full = f"{prefix}{name}"
        if isinstance(value, _Stored):
            yield full.removeprefix("module."), value  # in front of all where it was distributed
        elif isinstance(value, (dict, _Module)):
            yield from _flat(value, f"{full}.", visited)


def _open(
    path: epath.Path, local: Path, stored: dict[str, _Stored], entries: dict[str, zipfile.ZipInfo]
) -> Tensors:
    """Maps the file into memory, and its tensors into the map; `path` is for messages."""
    with local.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(name: str) -> np.ndarray:
        tensor = stored[name]
        info, dtype = entries[tensor.storage.key], tensor.storage.dtype
        if info.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path} is compressed, as PyTorch never does: save it again.")
        lengths = _LOCAL_HEADER.unpack_from(content, info.header_offset)
        start = info.header_offset + _LOCAL_HEADER.size + sum(lengths)
        data = memoryview(content)[start : start + info.file_size]
        offset = tensor.offset * dtype.itemsize
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        if math.prod(tensor.shape) > info.file_size // dtype.itemsize:  # strides of 0
            raise ValueError(f"{path}: {name} of {tensor.shape} is beyond its buffer")
        if not all(tensor.shape):
            return np.zeros(tensor.shape, np.float32)
        view = np.ndarray(tensor.shape, dtype, data, offset, strides)  # checks the bounds
        return np.array(view, np.float32)

    return Tensors({name: tensor.shape for name, tensor in stored.items()}, read)


# ---- Writing -----------------------------------------------------------------------------------


def write(tensors: Tensors, path: Path) -> None:
    """Writes a float32 state dict that `torch.load(path, weights_only=True)` reads."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", _pickled(tensors))
        archive.writestr("archive/byteorder", "little")
        for number, name in enumerate(tensors.shapes):
            with archive.open(f"archive/data/{number}", "w", force_zip64=True) as file:
                file.write(np.ascontiguousarray(tensors.read(name), "<f4").tobytes())
        archive.writestr("archive/version", "3\n")


def _pickled(tensors: Tensors) -> bytes:
    """Returns the description of the tensors as opcodes: pickle would need to import torch."""
    parts = [pickle.PROTO, b"\2", pickle.EMPTY_DICT, pickle.MARK]
    for number, (name, shape) in enumerate(tensors.shapes.items()):
        strides = list(itertools.accumulate(reversed(shape[1:]), int.__mul__, initial=1))[::-1]
        key, count = _text(str(number)), _integer(int(np.prod(shape)))
        storage = [_text("storage"), _global("torch FloatStorage"), key, _text("cpu"), count]
        sizes = [_tuple(map(_integer, part)) for part in (shape, strides[: len(shape)])]
        hooks = _global("collections OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
        arguments = [_tuple(storage) + pickle.BINPERSID, _integer(0), *sizes]
        arguments += [pickle.NEWFALSE, hooks]
        parts += [_text(name), _global("torch._utils _rebuild_tensor_v2")]
        parts += [_tuple(arguments), pickle.REDUCE]
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])


def _text(value: str) -> bytes:
    data = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    return pickle.LONG1 + b"\x08" + struct.pack("<q", value)


def _global(name: str) -> bytes:
    return pickle.GLOBAL + name.replace(" ", "\n").encode() + b"\n"


def _tuple(parts) -> bytes:
    return pickle.MARK + b"".join(parts) + pickle.TUPLE
