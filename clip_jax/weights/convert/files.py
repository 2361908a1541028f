"""Parts that the formats share: files of tensors by their ending, and a model opened from them."""

import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from clip_jax import models
from clip_jax.errors import UserError
from clip_jax.storage import faults, locations, ranges, remote
from clip_jax.weights.convert import torch_files
from clip_jax.weights.convert.mapping import Entry, export_tensors
from clip_jax.weights.folder import local_file, open_safetensors
from clip_jax.weights.model import Tensors, TokenizerFile, Weights, size_differences

# Names under which weights are published in a folder, the best first.
HUGGINGFACE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
OPEN_CLIP = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
TORCH = (".pt", ".pth", ".bin")
MAX_TEXT = 2**28  # bytes of a JSON file; that of a tokenizer has 2**25


@dataclass(frozen=True)
class ForeignWeights:
    """A model in the format of another project, its arrays not read yet.

    Attributes:
      size: shapes and forms, as its settings or shapes describe them.
      tensors: tensors by the names of the format.
      table: places of these tensors in ours.
      tokenizer: tokenizer of its captions.
      format: name of the format.
    """

    size: models.Size
    tensors: Tensors
    table: Sequence[Entry]
    tokenizer: TokenizerFile
    format: str


def find(folder: epath.Path, names: Sequence[str]) -> epath.Path | None:
    """Returns the first of these files that exists; None: there is none."""
    paths = [folder / name for name in names]
    stats = locations.stats(paths)
    return next((locations.inside(folder, name) for name, stat in zip(names, stats) if stat), None)


def exists(path: epath.Path) -> bool:
    """Returns whether a file or folder is there.

    Raises:
      UserError: its bucket is not there, or may not be read.
    """
    try:
        found = faults.repeat(path.exists, path)
    except Exception as error:
        if remote.is_remote(path) and faults.is_failure(error):
            raise UserError(faults.explain(error, path)) from error
        raise
    if not found and remote.is_remote(path):
        locations.check_bucket(path)
    return found


def read_json(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON object; UserError where it is damaged."""
    try:
        stat = locations.stat(path)
        if stat is not None and stat.size > MAX_TEXT:
            raise ValueError(f"its {stat.size:,} bytes are no settings")
        content = json.loads(ranges.read(path))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        return content
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): copy it again.") from error


def open_tensors(path: epath.Path) -> Tensors:
    """Opens a file of PyTorch or safetensors, or an index of several.

    Raises:
      UserError: it is missing, damaged, or holds more than weights.
    """
    if path.suffix in TORCH:
        return torch_files.read(path).tensors
    if path.suffix != ".json":
        return open_safetensors(path)
    named = read_json(path).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(part, str) for part in named.values()):
        raise UserError(f"{path} has no weight_map of tensors to files: copy it again.")
    parts = [locations.inside(path.parent, part) for part in sorted(set(named.values()))]
    opened = list(map(open_safetensors, parts))
    holders = {name: part for part in opened for name in part.shapes}
    shapes = {name: part.shapes[name] for name, part in holders.items()}
    return Tensors(shapes, lambda name: holders[name].read(name))


def without(tensors: Tensors, pattern: str) -> Tensors:
    """Returns the tensors whose names do not match a regular expression."""
    shapes = {k: shape for k, shape in tensors.shapes.items() if not re.search(pattern, k)}
    return Tensors(shapes, tensors.read)


def export(table: Sequence[Entry], weights: Weights) -> Tensors:
    """Returns our tensors in another format; UserError where it has no place for one."""
    known = {piece.path for row in table for piece in row.pieces}
    if homeless := [path for path in weights.tensors.shapes if path not in known]:
        raise UserError(
            f"The format has no place for {', '.join(homeless)} of {weights.size}: use "
            "--to=clip_jax."
        )
    return export_tensors(table, weights.tensors)


def open_npz(path: epath.Path) -> Tensors:
    """Opens the arrays of a NumPy archive as float32.

    Raises:
      UserError: it is damaged, or holds Python objects.
    """
    file = local_file(path)
    try:
        archive = np.load(file, allow_pickle=False)
        torch_files.check_inflation(archive.zip.filelist, file.stat().st_size)
        shapes = {name: _npy_shape(archive, name) for name in archive.files}
    except UserError as error:
        raise UserError(f"{path} is refused. {error}") from error
    except Exception as error:  # zipfile, NumPy and its parser each have their own
        raise UserError(f"{path} is no archive of NumPy ({error}): copy it again.") from error

    def read(name: str) -> np.ndarray:
        try:
            return np.asarray(archive[name], np.float32)
        except Exception as error:  # as above; checksums are compared as arrays are read
            raise UserError(f"{path} is damaged at {name} ({error}): copy it again.") from error

    return Tensors(shapes, read)


def _npy_shape(archive: Any, name: str) -> tuple[int, ...]:
    """Returns the shape of an array without reading its numbers."""
    with archive.zip.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        headers = {(1, 0): "read_array_header_1_0", (2, 0): "read_array_header_2_0"}
        return getattr(np.lib.format, headers[version])(file)[0]


def save_npz(tensors: Tensors, path: Path) -> None:
    """Writes a local NumPy archive, an array at a time."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in tensors.shapes:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(tensors.read(name)))


def check_expressible(where: str, nearest: models.Size, size: models.Size) -> None:
    """Raises UserError unless the nearest size that a format can express is the model's."""
    if wrong := size_differences(size, nearest):
        raise UserError(
            f"{where} has no such model: ours has {'; '.join(wrong.values())}. Convert it with "
            "another --to (clip_jax holds every model), or, for the activation alone, say "
            "--activation."
        )
