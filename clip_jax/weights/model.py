"""A model with all that must travel with it: shapes, forms, normalisation, tokenizer, origin.

The tensors have the paths of the variables as names, such as params/text/positions.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Float

from clip_jax import checksums, models
from clip_jax.data import published
from clip_jax.data import tokenizer as tokenizers
from clip_jax.data.published_tokenizer import Published
from clip_jax.data.tokenizer_base import PUBLISHED
from clip_jax.errors import UserError
from clip_jax.models.resize import resize_positions, resize_text_positions
from clip_jax.sharding import path_name
from clip_jax.state import abstract_variables, init_variables
from clip_jax.storage import locations, ranges

_LISTED = 8  # names in a message
_DIVERGED = "the model diverged in training, or the file is damaged. Take an earlier checkpoint."

Shape = tuple[int, ...]
Variables = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Tensors:
    """Named arrays, each read when it is asked for.

    Attributes:
      shapes: shapes by name, in the order in which reading is fastest.
      read: returns the array of a name.
      restore: reads all of them at once onto the devices that `state.abstract_variables` names,
        each process only its own parts; None: they can only be read one by one.
    """

    shapes: Mapping[str, Shape]
    read: Callable[[str], np.ndarray]
    restore: Callable[[Variables], Variables] | None = None


@dataclasses.dataclass(frozen=True)
class TokenizerFile:
    """The tokenizer of a model and its vocabulary on disk.

    Attributes:
      name: "openai"; or the kind of `path`, "sentencepiece", "siglip" or "huggingface"; "": not
        known.
      identity: names the vocabulary and its checksum; "": not known.
      path: vocabulary, or the folder of one of kind "huggingface"; None: there is no file.
    """

    name: str
    identity: str
    path: epath.Path | None = None

    @classmethod
    def from_setting(cls, setting: str, identity: str) -> "TokenizerFile":
        """Returns what `setting`, the field `tokenizer` of a config, refers to."""
        if setting.startswith(tokenizers.SIGLIP):
            path = locations.parse(setting.removeprefix(tokenizers.SIGLIP))
            return cls("siglip", identity, path)
        if setting.startswith(PUBLISHED):
            path = locations.parse(setting.removeprefix(PUBLISHED))
            return cls("huggingface", identity, path)
        if setting.endswith(".model"):
            return cls("sentencepiece", identity, locations.parse(setting))
        return cls(setting, identity)

    @property
    def setting(self) -> str:
        """The field `tokenizer` of a config; "": not known."""
        if self.path is None:
            return self.name
        if self.name == "huggingface":
            return f"{PUBLISHED}{self.path}"
        return f"{tokenizers.SIGLIP if self.name == 'siglip' else ''}{self.path}"

    def create(self, context_length: int) -> tokenizers.Tokenizer | None:
        """Creates the tokenizer and checks its identity; None where it is not known.

        Raises:
          UserError: its vocabulary is not the one the model was trained with.
        """
        if not self.name:
            return None
        tokenizer = tokenizers.create(self.setting, context_length)
        if tokenizer.identity != self.identity:
            raise UserError(
                f"The model was trained with the tokenizer {self.identity}, but "
                f"{self.path or self.name} is now {tokenizer.identity}."
            )
        return tokenizer

    def files(self) -> dict[str, bytes]:
        """Returns the files from which it can be made again, by name; {}: it needs none."""
        if self.path is None:
            return {}
        if self.name == "huggingface":
            return self.published().files()
        return {self.path.name: ranges.read(self.path)}

    def published(self) -> Published:
        """Returns the vocabulary and rules of one of kind "huggingface".

        Raises:
          UserError: it is gone, damaged, or not the one the model was trained with.
        """
        assert self.path is not None
        found = published.find(self.path)
        if found is None or found.identity != self.identity:
            now = "gone" if found is None else found.identity
            raise UserError(
                f"The model was trained with the tokenizer {self.identity}, but that in "
                f"{self.path} is now {now}."
            )
        return found


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model with all that is needed to use it.

    Attributes:
      size: shapes, forms and normalisation.
      tensors: float32, by the paths of the variables.
      tokenizer: tokenizer of its captions.
      origin: JSON-serialisable; "source" and "format" say where it comes from.
    """

    size: models.Size
    tensors: Tensors
    tokenizer: TokenizerFile
    origin: Mapping[str, Any]

    @property
    def parameters(self) -> int:
        """The number of trainable values."""
        shapes = variable_shapes(self.size).items()
        return sum(math.prod(shape) for name, shape in shapes if name.startswith("params/"))

    def variables(self, mesh: Mesh) -> Variables:
        """Returns the variables on a mesh, split as training splits them.

        Every process of the mesh calls this and keeps only its parts. A checkpoint is restored
        straight onto the devices.

        Raises:
          UserError: tensors are missing, superfluous, of another shape, or hold NaN.
        """
        check_shapes(self.tensors.shapes, variable_shapes(self.size), self.origin["source"])
        like = abstract_variables(models.of_size(self.size), mesh)
        if self.tensors.restore is not None:
            variables = self.tensors.restore(like)
            if broken := checksums.inspect(variables).not_finite:  # the same on all hosts
                raise UserError(
                    f"{len(broken)} tensors of {self.origin['source']} hold values that are NaN or "
                    f"infinite, such as {broken[0]}: {_DIVERGED}"
                )
            return variables

        def place(path: tuple, like: jax.ShapeDtypeStruct) -> jax.Array:
            value = read_finite(self.tensors, path_name(path)).astype(like.dtype)
            return jax.make_array_from_callback(like.shape, like.sharding, lambda part: value[part])

        return jax.tree.map_with_path(place, like)

    def resized(
        self, image_size: int | None = None, context_length: int | None = None
    ) -> "Weights":
        """Returns the model for another resolution or context, its positions interpolated.

        Args:
          image_size: pixels along a side; bicubic on the grid of positions. None: unchanged.
          context_length: tokens of a caption; linear. None: unchanged.

        Raises:
          UserError: the patches do not divide another image size.
        """
        patch = self.size.patch_size or 1
        if image_size and image_size != self.size.image_size and image_size % patch:
            raise UserError(
                f"--image_size={image_size} is no multiple of the patches of {patch} pixels: its "
                f"edge would be cut off. Take {max(image_size // patch, 1) * patch} or "
                f"{(image_size // patch + 1) * patch}."
            )
        size = dataclasses.replace(
            self.size,
            image_size=image_size or self.size.image_size,
            context_length=context_length or self.size.context_length,
        )
        shapes = variable_shapes(size).items()
        changed = {name: shape for name, shape in shapes if shape != self.tensors.shapes.get(name)}

        def read(name: str) -> np.ndarray:
            value = self.tensors.read(name)
            if name not in changed:
                return value
            length = changed[name][0]
            if name.startswith("params/text/"):
                return np.asarray(resize_text_positions(value, length))
            path = name.split("/")[1:]
            tree: Any = functools.reduce(lambda node, key: {key: node}, reversed(path), value)
            return np.asarray(jax.tree.leaves(resize_positions(tree, length))[0])

        tensors = Tensors({**self.tensors.shapes, **changed}, read)
        return dataclasses.replace(self, size=size, tensors=tensors)

    def describe(self) -> str:
        """Describes the model and its preprocessing of images and captions, in three lines."""
        size, origin = self.size, self.origin
        step = f", step {origin['step']:,}" if origin.get("step") else ""
        tokens = self.tokenizer.identity[:24] or "unknown tokenizer"
        return (
            f"{size}, {self.parameters / 1e6:,.1f} M parameters, {size.activations}, "
            f"from {origin['source']} ({origin['format']}{step})\n"
            f"  pictures: {size.preprocessing}\n"
            f"  captions: {tokens}, {size.context_length} tokens"
        )


@functools.lru_cache(maxsize=16)
def variable_shapes(size: models.Size) -> dict[str, Shape]:
    """Returns the shapes of all variables of a model by path, such as "params/text/positions"."""
    tree = jax.eval_shape(lambda: init_variables(models.of_size(size), 0))
    return {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}


def variables_by_path(variables: Variables) -> dict[str, jax.Array]:
    """Returns the variables of a model in memory by path."""
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(variables)}


def size_differences(actual: models.Size, expected: models.Size) -> dict[str, str]:
    """Returns the fields in which two sizes differ, with both values in words."""
    names = [field.name for field in dataclasses.fields(models.Size)]
    pairs = {name: (getattr(actual, name), getattr(expected, name)) for name in names}
    return {name: f"{name} {a!r}, not {b!r}" for name, (a, b) in pairs.items() if a != b}


# ---- Checks ------------------------------------------------------------------------------------


def read_finite(tensors: Tensors, name: str) -> Float[np.ndarray, "..."]:
    """Reads an array; UserError where it holds NaN or infinity."""
    value = np.asarray(tensors.read(name))  # NumPy makes scalars of arrays without axes
    check_finite(name, value)
    return value


def check_finite(name: str, value: Float[np.ndarray, "..."]) -> None:
    """Raises UserError if an array holds NaN or infinity."""
    if not np.isfinite(value).all():
        count = value.size - np.isfinite(value).sum()
        raise UserError(
            f"The tensor {name} holds {count:,} values of {value.size:,} that are NaN or infinite: "
            f"{_DIVERGED}"
        )


def check_shapes(actual: Mapping[str, Shape], expected: Mapping[str, Shape], source: Any) -> None:
    """Raises UserError unless both have the same names with the same shapes."""
    for name, shape in expected.items():
        if name in actual and tuple(actual[name]) != tuple(shape):
            raise UserError(
                f"{source} is of another architecture: its {name} is {list(actual[name])}, where "
                f"the model has {list(shape)}. Name the model it is of (--model), or, where only "
                "positions differ, the resolution (--image_size) or --context_length it has."
            )
    missing = [name for name in expected if name not in actual]
    extra = [name for name in actual if name not in expected]
    if missing or extra:
        parts = [("lacks", missing), ("has besides", extra)]
        lists = [f"{verb} {_listed(names)}" for verb, names in parts if names]
        raise UserError(
            f"{source} is of another architecture, or not complete: it {', and '.join(lists)}. "
            "Name the model it is of (--model)."
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return f"{len(names):,} tensor(s) ({', '.join(names[:_LISTED])}{more})"
