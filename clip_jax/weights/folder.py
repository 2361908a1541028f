"""A model as a folder that anyone can read: model.safetensors and clip_jax.json.

The tensors have the paths of the variables as names; the JSON has the rest of `Weights`.
"""

import dataclasses
import json
import pathlib
import zlib
from collections.abc import Mapping

import numpy as np
import safetensors.numpy
from etils import epath
from safetensors import SafetensorError, safe_open

from clip_jax import models
from clip_jax.errors import UserError
from clip_jax.storage import locations, ranges, remote
from clip_jax.weights.model import (
    Tensors,
    TokenizerFile,
    Weights,
    check_shapes,
    read_finite,
    variable_shapes,
)

_TENSORS, _DESCRIPTION = "model.safetensors", "clip_jax.json"
_FORMAT = 1  # version of the description


def is_folder(path: epath.Path) -> bool:
    """Returns whether `path` holds a model as `write` writes it."""
    return locations.stat(path / _DESCRIPTION) is not None


def write(weights: Weights, folder: pathlib.Path) -> None:
    """Writes a model to a local folder; needs its size in memory once."""
    folder.mkdir(parents=True, exist_ok=True)
    checksums = save_safetensors(weights.tensors, folder / _TENSORS)
    files = weights.tokenizer.files()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    description = {
        "format": _FORMAT,
        "size": dataclasses.asdict(weights.size),
        "tokenizer": {
            "name": weights.tokenizer.name,
            "identity": weights.tokenizer.identity,
            "file": next(iter(files), None),
        },
        "origin": dict(weights.origin),
        "checksums": checksums,
    }
    (folder / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def read(folder: epath.Path) -> Weights:
    """Reads what `write` wrote, the arrays when they are asked for.

    Raises:
      UserError: a file is missing or damaged.
    """
    try:
        description = json.loads(ranges.read(folder / _DESCRIPTION))
        size, fields = models.Size.from_json(description["size"]), description["tokenizer"]
        file = locations.inside(folder, fields["file"]) if fields["file"] else None
        if fields["name"] == "huggingface":  # its files name each other
            file = folder
        tokenizer = TokenizerFile(fields["name"], fields["identity"], file)
        origin = {**description["origin"], "source": str(folder)}
        checksums = dict(description.get("checksums", {}))  # early folders have none
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{folder / _DESCRIPTION} cannot be read as the description of a model "
            f"({type(error).__name__}: {error}). Convert the model again."
        ) from error
    tensors = open_safetensors(folder / _TENSORS)
    check_shapes(tensors.shapes, variable_shapes(size), folder / _TENSORS)
    return Weights(size, _verified(tensors, checksums, folder / _TENSORS), tokenizer, origin)


def _verified(tensors: Tensors, checksums: Mapping[str, str], path: epath.Path) -> Tensors:
    """Returns tensors that are compared with their checksums when they are read."""

    def read(name: str) -> np.ndarray:
        value = tensors.read(name)
        if checksums.get(name, actual := checksum(value)) != actual:
            raise UserError(
                f"{path} is damaged: the numbers of {name} are not those that were written (their "
                "checksum differs). Copy or convert the model again."
            )
        return value

    return Tensors(tensors.shapes, read)


def checksum(value: np.ndarray) -> str:
    """Returns the CRC-32 of an array's numbers as float32."""
    numbers = np.ascontiguousarray(value, "<f4").reshape(-1)
    return f"{zlib.crc32(numbers.view(np.uint8).data):08x}"


# ---- Files of tensors --------------------------------------------------------------------------


def save_safetensors(
    tensors: Tensors, path: pathlib.Path, metadata: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Writes all arrays to one local file; returns their checksums."""
    arrays = {name: np.ascontiguousarray(read_finite(tensors, name)) for name in tensors.shapes}
    # ascontiguousarray makes a vector of a scalar.
    arrays = {name: value.reshape(tensors.shapes[name]) for name, value in arrays.items()}
    path = pathlib.Path(path)
    path.touch()
    mode = path.stat().st_mode
    safetensors.numpy.save_file(arrays, path, metadata=dict(metadata or {}))
    path.chmod(mode)  # the library's files are readable by their owner alone
    return {name: checksum(value) for name, value in arrays.items()}


def open_safetensors(path: epath.Path) -> Tensors:
    """Opens the arrays of a file as float32.

    Raises:
      UserError: the file is missing or damaged.
    """
    try:
        file = safe_open(local_file(path), "numpy")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError, ranges.Replaced) as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({error}). Copy or convert it again."
        ) from error
    return Tensors(shapes, lambda name: file.get_tensor(name).astype(np.float32, copy=False))


def local_file(path: epath.Path) -> pathlib.Path:
    """Returns a file that can be mapped into memory: the local one, or the copy of one in a bucket.

    Raises:
      FileNotFoundError: there is no such object.
    """
    if not remote.is_remote(path):
        return pathlib.Path(path)
    stat = locations.stat(path)
    if stat is None:
        raise FileNotFoundError(f"There is no {path}")
    return ranges.local_copy(path, stat)
