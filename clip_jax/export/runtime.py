"""Runs a StableHLO export; of everything installed, it needs JAX and NumPy only."""

import json
import os
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import numpy as np

from clip_jax.errors import UserError

# Names of the files of an export.
PREPROCESS, TENSORS, STABLEHLO = "preprocess.json", "model.safetensors", ".stablehlo"
DESCRIPTION = "clip_jax.json"
TOWERS = ("encode_image", "encode_text")  # methods of the model, and the stems of their files


class Exported:
    """Both towers of an exported model. Every new batch size is compiled once.

    Attributes:
      preprocess: content of preprocess.json: how images and texts are prepared, and how
        similarities become probabilities.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        """Opens a folder; see `clip_jax.export.load`."""
        find = _finder(directory)
        try:
            self.preprocess: dict[str, Any] = json.loads(find(PREPROCESS).read_text("utf-8"))
            checksums = json.loads(find(DESCRIPTION).read_text("utf-8")).get("checksums", {})
            self._weights = jax.device_put(_read_tensors(find(TENSORS), checksums))
            self._image, self._text = (
                jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)
                for path in (find(f"{tower}{STABLEHLO}") for tower in TOWERS)
            )
        except UserError:
            raise
        except Exception as error:  # whatever a damaged file makes of the libraries below
            raise UserError(
                f"{directory} is no complete StableHLO export ({type(error).__name__}: {error}): "
                "write it anew with python -m clip_jax export --format=stablehlo."
            ) from error

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        """Embeds images.

        Args:
          pixels: uint8 [n, size, size, 3], RGB, resized and cropped as `preprocess` says.

        Returns:
          float32 [n, embed_dim], L2-normalised.

        Raises:
          UserError: another dtype or shape.
        """
        side = self.preprocess["image"]["size"]
        return self._run(self._image, "Pixels", pixels, np.dtype(np.uint8), (side, side, 3))

    def encode_text(self, tokens: np.ndarray) -> np.ndarray:
        """Embeds texts.

        Args:
          tokens: int32 [n, context_length], as the tokenizer in `preprocess` makes them.

        Returns:
          float32 [n, embed_dim], L2-normalised.

        Raises:
          UserError: another dtype or shape.
        """
        length = self.preprocess["text"]["context_length"]
        return self._run(self._text, "Tokens", tokens, np.dtype(np.int32), (length,))

    def _run(
        self, tower: Any, what: str, rows: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]
    ) -> np.ndarray:
        if rows.dtype != dtype or rows.ndim != len(shape) + 1 or rows.shape[1:] != shape:
            raise UserError(
                f"{what} are {dtype} {['n', *shape]}, not {rows.dtype} {list(rows.shape)}: "
                f"prepare them as {PREPROCESS} says."
            )
        if not len(rows):
            return np.zeros((0, self.preprocess["embed_dim"]), np.float32)
        return np.asarray(tower(self._weights, rows))


def _finder(directory: str | os.PathLike[str]) -> Callable[[str], pathlib.Path]:
    """Returns a function to the local path of a file.

    A file in a bucket is copied, which needs all of clip_jax.
    """
    if "://" not in os.fspath(directory):
        return pathlib.Path(directory).joinpath
    from clip_jax.storage import locations
    from clip_jax.weights.folder import local_file

    folder = locations.parse(directory)
    return lambda name: local_file(folder / name)


def _read_tensors(path: pathlib.Path, checksums: dict[str, str]) -> dict[str, np.ndarray]:
    """Maps the arrays of a safetensors file, all float32, into memory.

    The format is a length, a JSON header and the bytes: reading it here saves whoever serves a
    model one more package.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("its header is longer than the file")
        header = json.loads(file.read(length))
        data = np.memmap(path, np.uint8, "r", offset=file.tell())
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        arrays[name] = data[begin:end].view(np.float32).reshape(entry["shape"])
        found = f"{zlib.crc32(data[begin:end].data):08x}"
        if checksums.get(name, found) != found:
            raise UserError(
                f"{path} is damaged: the numbers of {name} are not those that were written (their "
                "checksum differs). Copy the export again."
            )
    return arrays
