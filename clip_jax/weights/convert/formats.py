"""The formats of other projects: recognised, read and written."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from etils import epath

from clip_jax import models
from clip_jax.errors import UserError
from clip_jax.models.size_checks import CHOICES
from clip_jax.storage import faults, locations, writing
from clip_jax.weights import folder
from clip_jax.weights.convert import (
    big_vision,
    files,
    huggingface,
    open_clip,
    openai,
    tokens,
    torch_files,
)
from clip_jax.weights.convert.mapping import import_tensors
from clip_jax.weights.model import Weights, variable_shapes

READABLE = (
    "a workdir or checkpoint of clip_jax; a folder that was converted before; a folder of "
    "transformers or open_clip; a .pt, .bin or .safetensors file; a .npz file of big_vision; or a "
    "name on the Hugging Face hub, ORG/NAME"
)


def read(path: epath.Path, model: str, activation: str, tokenizer: str) -> Weights:
    """Opens a file or folder of another project; its arrays are read later.

    Args:
      path: file or folder, local or in a bucket.
      model, activation, tokenizer: arguments of `weights.open`.

    Raises:
      UserError: it is of no known format, damaged, or does not say what model it is.
    """
    foreign = _open(path, model, activation, tokenizer)
    shapes = variable_shapes(foreign.size)
    return Weights(
        size=foreign.size,
        tensors=import_tensors(foreign.table, foreign.tensors, shapes, path),
        tokenizer=foreign.tokenizer,
        origin={"source": str(path), "format": foreign.format},
    )


def _open(path: epath.Path, model: str, activation: str, tokenizer: str) -> files.ForeignWeights:
    if faults.repeat(path.is_dir, path):
        if huggingface.is_folder(path):
            return huggingface.read(path, tokenizer)
        if open_clip.is_folder(path):
            return open_clip.read(path, tokenizer)
        huggingface.check_kind(path)
    elif path.suffix == ".npz":
        return big_vision.read(path, tokenizer)
    elif path.suffix in (*files.TORCH, ".safetensors"):
        return _open_file(path, model, activation, tokenizer)
    raise UserError(f"{path} holds no model that can be read: give {READABLE}.")


def _open_file(
    path: epath.Path, model: str, activation: str, tokenizer: str
) -> files.ForeignWeights:
    """Opens a bare state dict, or OpenAI's archive."""
    if path.suffix in files.TORCH:
        opened = torch_files.read(path)
    else:
        opened = torch_files.TorchFile(files.open_tensors(path), code="")
    code, theirs = opened.code, files.without(opened.tensors, openai.NO_WEIGHTS)
    if code:
        size = openai.size_of(theirs.shapes, path)
        if ("sigmoid(" not in code or "gelu(" in code) and not activation:
            raise UserError(
                f"{path} has no QuickGELU in its code, x * sigmoid(1.702 x), as OpenAI's archives "
                f"have: say which --activation it has, {', '.join(CHOICES['activation'])}."
            )
    elif model:
        size = models.get_size(model, {"activation": activation or None})
    else:
        raise UserError(
            f"{path} is a bare list of tensors, which does not say what activation, heads and "
            "normalisation the model has: name it with --model, one of "
            f"{', '.join(models.available_models())}; and with --activation=gelu where it was "
            "trained by open_clip without -quickgelu in its name."
        )
    custom_text = any(name.startswith("text.") for name in theirs.shapes)
    return files.ForeignWeights(
        size=size,
        tensors=theirs,
        table=open_clip.table(size, custom_text),
        tokenizer=tokens.named(tokenizer, size) if tokenizer else tokens.find(path.parent, size),
        format="openai" if code else "open_clip",
    )


# ---- Writing -----------------------------------------------------------------------------------


class Format(NamedTuple):
    """A format that can be written.

    Attributes:
      write: writes a model to a local file or folder.
      suffix: ending of the file; "": it is a folder.
    """

    write: Callable[[Weights, Path], None]
    suffix: str


FORMATS = {
    "clip_jax": Format(folder.write, ""),
    "huggingface": Format(huggingface.write, ""),
    "open_clip": Format(open_clip.write, ""),
    "openai": Format(openai.write, ".pt"),
    "big_vision": Format(big_vision.write, ".npz"),
}


def save(weights: Weights, target: epath.PathLike, to: str) -> None:
    """Writes a model as `weights.save`, which documents the arguments."""
    if to not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(f"There is no format {to!r} to convert to: take one of {known}.")
    write, suffix = FORMATS[to]
    path = locations.parse(target)
    if files.exists(path):
        raise UserError(f"{path} is there already: name another target, or delete it first.")
    if suffix and path.suffix != suffix:
        raise UserError(f"{to} has files that end in {suffix}: call the target {path}{suffix}.")
    if to == "huggingface" and weights.size.is_resnet:
        raise UserError(
            "transformers has no CLIP with a ResNet: use --to=open_clip, which has them all."
        )
    if to != "clip_jax" and not weights.size.is_known_elsewhere:
        raise UserError(
            f"{to} has no such model as {weights.size}: it has CLIP and its like, an image tower "
            "and a text transformer. Use --to=clip_jax, which holds every model."
        )
    with writing.replacing_folder(path) as local:
        write(weights, local)
