"""A model as a folder that anyone can read: model.safetensors and clip_jax.json.

The tensors have the paths of the variables as names, such as params/text/positions; the JSON has
all that must travel with them: shapes and forms, normalisation, tokenizer, where they come from.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from etils import epath
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from clip_jax import models
from clip_jax.data.tokenizer import SIGLIP
from clip_jax.errors import UserError
from clip_jax.models.resize import resize_positions, resize_text_positions
from clip_jax.sharding import path_name
from clip_jax.state import abstract_variables, init_variables
from clip_jax.storage import locations, ranges, remote

TENSORS, DESCRIPTION = "model.safetensors", "clip_jax.json"
_FORMAT = 1  # of the description
_SHOWN = 8  # names in a message

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tensors:
    """Named arrays, each read when it is asked for.

    Attributes:
      shapes: of all of them, in the order in which they are best read.
      read: gives the array of a name.
    """

    shapes: Mapping[str, Shape]
    read: Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class TokenizerFile:
    """How captions become ids.

    Attributes:
      name: "openai"; or the kind of `path`, "sentencepiece" or "siglip"; "": not known.
      identity: names the vocabulary and its checksum; "": not known.
      path: of the vocabulary; None: there is no file.
    """

    name: str
    identity: str
    path: epath.Path | None = None

    @classmethod
    def from_setting(cls, setting: str, identity: str) -> "TokenizerFile":
        """Of what a config has as `tokenizer`."""
        if setting.startswith(SIGLIP):
            return cls("siglip", identity, locations.parse(setting.removeprefix(SIGLIP)))
        if setting.endswith(".model"):
            return cls("sentencepiece", identity, locations.parse(setting))
        return cls(setting, identity)

    @property
    def setting(self) -> str:
        """What a config has as `tokenizer`; "": not known."""
        if self.path is None:
            return self.name
        return f"{SIGLIP if self.name == 'siglip' else ''}{self.path}"


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model with all that is needed to use it.

    Attributes:
      size: shapes, forms and normalisation.
      tensors: float32, by the paths of the variables.
      tokenizer: of its captions.
      origin: JSON-serialisable; "source" and "format" say where it comes from.
    """

    size: models.Size
    tensors: Tensors
    tokenizer: TokenizerFile
    origin: Mapping[str, Any]


@functools.lru_cache(maxsize=16)
def variable_shapes(size: models.Size) -> dict[str, Shape]:
    """Shapes of all variables of a model by path, such as "params/text/positions"."""
    tree = jax.eval_shape(lambda: init_variables(models.of_size(size), 0))
    return {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}


def of_variables(variables: Any) -> Tensors:
    """The tensors of a model in memory."""
    leaves = jax.tree.leaves_with_path(variables)
    arrays = {path_name(path): leaf for path, leaf in leaves}
    shapes = {name: leaf.shape for name, leaf in arrays.items()}
    return Tensors(shapes, lambda name: np.asarray(arrays[name], np.float32))


def to_variables(weights: Weights, mesh: Mesh) -> dict[str, Any]:
    """The variables on a mesh, split as training splits them; every process reads its share.

    Raises:
      UserError: tensors are missing, superfluous, of another shape, or hold NaN.
    """
    check_shapes(weights.tensors.shapes, variable_shapes(weights.size), weights.origin["source"])

    def place(path: tuple, like: jax.ShapeDtypeStruct) -> jax.Array:
        value = read_finite(weights.tensors, path_name(path)).astype(like.dtype)
        return jax.make_array_from_callback(like.shape, like.sharding, lambda part: value[part])

    like = abstract_variables(models.of_size(weights.size), mesh)
    return jax.tree.map_with_path(place, like)


def read_finite(tensors: Tensors, name: str) -> np.ndarray:
    """An array; UserError where it holds NaN or infinity."""
    value = tensors.read(name)
    if not np.isfinite(value).all():
        count = value.size - np.isfinite(value).sum()
        raise UserError(
            f"The tensor {name} holds {count:,} values of {value.size:,} that are NaN or infinite: "
            "the model diverged in training, or the file is damaged. Take an earlier checkpoint."
        )
    return value


def check_shapes(found: Mapping[str, Shape], wanted: Mapping[str, Shape], source: Any) -> None:
    """Raises UserError unless both have the same names with the same shapes."""
    for name, shape in wanted.items():
        if name in found and tuple(found[name]) != tuple(shape):
            raise UserError(
                f"{source} is of another architecture: its {name} is {list(found[name])}, where "
                f"the model has {list(shape)}. Name the model it is of (--model), or, where only "
                "positions differ, the resolution (--image_size) or --context_length it has."
            )
    missing, extra = (
        [name for name in these if name not in those]
        for these, those in ((wanted, found), (found, wanted))
    )
    if missing or extra:
        parts = [("lacks", missing), ("has besides", extra)]
        lists = [f"{verb} {_listed(names)}" for verb, names in parts if names]
        raise UserError(
            f"{source} is of another architecture, or not complete: it {', and '.join(lists)}. "
            "Name the model it is of (--model)."
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f"{len(names):,} tensor(s) ({', '.join(names[:_SHOWN])}{more})"


def differences(found: models.Size, wanted: models.Size) -> dict[str, str]:
    """The fields in which two sizes differ, and both values in words."""
    names = [field.name for field in dataclasses.fields(models.Size)]
    pairs = {name: (getattr(found, name), getattr(wanted, name)) for name in names}
    return {name: f"{name} {a!r}, not {b!r}" for name, (a, b) in pairs.items() if a != b}


def resized(
    weights: Weights, image_size: int | None = None, context_length: int | None = None
) -> Weights:
    """The same model for another resolution or context, its positions interpolated.

    Args:
      weights: to change.
      image_size: pixels along a side; bicubic on the grid of positions. None: as it is.
      context_length: of captions; linear. None: as it is.

    Raises:
      UserError: an image size that the patches do not divide.
    """
    size = dataclasses.replace(
        weights.size,
        image_size=image_size or weights.size.image_size,
        context_length=context_length or weights.size.context_length,
    )
    wanted = variable_shapes(size)
    changed = {k: shape for k, shape in wanted.items() if shape != weights.tensors.shapes.get(k)}

    def read(name: str) -> np.ndarray:
        value = weights.tensors.read(name)
        if name not in changed:
            return value
        length = changed[name][0]
        if name.startswith("params/text/"):
            return np.asarray(resize_text_positions(value, length))
        path = name.split("/")[1:]
        tree: Any = functools.reduce(lambda node, key: {key: node}, reversed(path), value)
        return np.asarray(jax.tree.leaves(resize_positions(tree, length))[0])

    tensors = Tensors({**weights.tensors.shapes, **changed}, read)
    return dataclasses.replace(weights, size=size, tensors=tensors)


def describe(weights: Weights) -> str:
    """What the model is and how it takes pictures and captions, in three lines."""
    size, origin = weights.size, weights.origin
    shapes = [s for name, s in variable_shapes(size).items() if name.startswith("params/")]
    count = sum(math.prod(shape) for shape in shapes)
    step = f", step {origin['step']:,}" if origin.get("step") else ""
    whole = f"squashed to {size.image_size} x {size.image_size} pixels (bicubic)"
    middle = f"shorter side to {size.image_size} pixels (bicubic), middle square"
    mean, std = (" ".join(f"{x:.4g}" for x in part) for part in (size.image_mean, size.image_std))
    tokens = weights.tokenizer.identity[:24] or "unknown tokenizer"
    return (
        f"{size}, {count / 1e6:,.1f} M parameters, {size.activation}, "
        f"from {origin['source']} ({origin['format']}{step})\n"
        f"  pictures: {middle if size.image_crop == 'center' else whole}, mean {mean}, std {std}\n"
        f"  captions: {tokens}, {size.context_length} tokens"
    )


# ---- The folder --------------------------------------------------------------------------------


def is_folder(path: epath.Path) -> bool:
    """Whether a model lies there as `write_folder` writes it."""
    return locations.stat(path / DESCRIPTION) is not None


def write_folder(weights: Weights, folder: pathlib.Path) -> None:
    """Writes a model to a local folder; needs its size in memory once."""
    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(weights.tensors, folder / TENSORS)
    file = weights.tokenizer.path
    if file is not None:
        (folder / file.name).write_bytes(ranges.read(file))
    description = {
        "format": _FORMAT,
        "size": dataclasses.asdict(weights.size),
        "tokenizer": {
            "name": weights.tokenizer.name,
            "identity": weights.tokenizer.identity,
            "file": file.name if file is not None else None,
        },
        "origin": dict(weights.origin),
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def read_folder(folder: epath.Path) -> Weights:
    """Reads what `write_folder` wrote, the arrays when they are asked for.

    Raises:
      UserError: a file is missing or damaged.
    """
    try:
        about = json.loads(ranges.read(folder / DESCRIPTION))
        size, tokenizer = models.Size.from_json(about["size"]), about["tokenizer"]
        file = folder / tokenizer["file"] if tokenizer["file"] else None
        kind = TokenizerFile(tokenizer["name"], tokenizer["identity"], file)
        origin = {**about["origin"], "source": str(folder)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{folder / DESCRIPTION} cannot be read as the description of a model "
            f"({type(error).__name__}: {error}). Convert the model again."
        ) from error
    return Weights(size, open_safetensors(folder / TENSORS), kind, origin)


def save_safetensors(
    tensors: Tensors, path: pathlib.Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes all arrays to one local file."""
    arrays = {name: np.ascontiguousarray(read_finite(tensors, name)) for name in tensors.shapes}
    # ascontiguousarray makes a vector of a scalar.
    arrays = {name: value.reshape(tensors.shapes[name]) for name, value in arrays.items()}
    safetensors.numpy.save_file(arrays, path, metadata=dict(metadata or {}))


def open_safetensors(path: epath.Path) -> Tensors:
    """The arrays of a file, float32.

    Raises:
      UserError: it is missing or damaged.
    """
    try:
        file = safe_open(local_file(path), "numpy")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ranges.Replaced) as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({error}). Copy or convert it again."
        ) from error
    return Tensors(shapes, lambda name: file.get_tensor(name).astype(np.float32, copy=False))


def local_file(path: epath.Path) -> pathlib.Path:
    """A file that can be mapped into memory: itself, or the copy of one in a bucket.

    Raises:
      FileNotFoundError: there is no such object.
    """
    if not remote.is_remote(path):
        return pathlib.Path(path)
    stat = locations.stat(path)
    if stat is None:
        raise FileNotFoundError(f"There is no {path}")
    return ranges.local_copy(path, stat)
