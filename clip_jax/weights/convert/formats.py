"""Which format a file or folder has, and how it is read and written."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from clip_jax import checkpoint, models, sharding
from clip_jax.errors import UserError
from clip_jax.models.sizes import CHOICES
from clip_jax.storage import faults, locations, writing
from clip_jax.weights.base import (
    TokenizerFile,
    Weights,
    differences,
    is_folder,
    of_variables,
    read_folder,
    to_variables,
    variable_shapes,
    write_folder,
)
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

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_TAKES = (
    "a workdir or checkpoint of clip_jax; a folder that was converted before; a folder of "
    "transformers or open_clip; a .pt, .bin or .safetensors file; or a .npz file of big_vision"
)


def read(
    source: epath.PathLike,
    *,
    model: str = "",
    activation: str = "",
    tokenizer: str = "",
    step: int | None = None,
) -> Weights:
    """Opens a model in any format; its numbers are read later.

    Args:
      source: file or folder, local or in a bucket; or a name on the Hugging Face hub, such as
        "org/name".
      model: what it must be, one of `available_models()`; needed for a bare state dict. "": as
        found.
      activation: what it runs with, whatever the source says. "": as found.
      tokenizer: "openai", or the vocabulary file of a SigLIP model. "": as found.
      step: which checkpoint of a workdir; None: the most recent.

    Raises:
      UserError: nothing is there, it is damaged, or is not what the arguments say.
    """
    path = locate(source)
    if _is_workdir(path):
        weights = _read_workdir(path, step)
    elif is_folder(path):
        weights = read_folder(path)
    else:
        weights = _convert(_find(path, model, activation, tokenizer), path)
    if activation:
        size = dataclasses.replace(weights.size, activation=activation)
        weights = dataclasses.replace(weights, size=size)
    if model and (wrong := differences(weights.size, models.get_size(model))):
        raise UserError(
            f"{source} is not {model}: it has {'; '.join(wrong.values())}. Leave --model out to "
            "take it as it is."
        )
    return weights


def read_variables(
    source: epath.PathLike, mesh: Mesh
) -> tuple[models.Size, dict[str, Any], TokenizerFile]:
    """A model in any format, split over a mesh as training splits it; errors as of `read`.

    Args:
      source: as of `read`; a workdir without a step means its most recent checkpoint.
      mesh: where the parameters will live; every process of it calls this.
    """
    path = locate(source)
    if _is_workdir(path):
        net, variables, meta = checkpoint.load_model(path, mesh)
        return net.size, variables, _tokenizer(meta)
    found = read(path)
    return found.size, to_variables(found, mesh), found.tokenizer


def _convert(found: files.Found, path: epath.Path) -> Weights:
    shapes = variable_shapes(found.size)
    return Weights(
        size=found.size,
        tensors=import_tensors(found.table, found.theirs, shapes, path),
        tokenizer=found.tokenizer,
        origin={"source": str(path), "format": found.format},
    )


def _find(path: epath.Path, model: str, activation: str, tokenizer: str) -> files.Found:
    if faults.repeat(path.is_dir, path):
        if huggingface.holds(path):
            return huggingface.read(path, tokenizer)
        if open_clip.holds(path):
            return open_clip.read(path, tokenizer)
    elif path.suffix == ".npz":
        return big_vision.read(path, tokenizer)
    elif path.suffix in (*files.TORCH, ".safetensors"):
        return _find_in_file(path, model, activation, tokenizer)
    raise UserError(f"{path} holds no model that can be read: give {_TAKES}.")


def _find_in_file(path: epath.Path, model: str, activation: str, tokenizer: str) -> files.Found:
    """A bare state dict, or OpenAI's archive."""
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
    return files.Found(
        size=size,
        theirs=theirs,
        table=open_clip.table(size, custom_text),
        tokenizer=tokens.named(tokenizer, size) if tokenizer else tokens.find(path.parent, size),
        format="openai" if code else "open_clip",
    )


# ---- Workdirs and the hub ----------------------------------------------------------------------


def _is_workdir(path: epath.Path) -> bool:
    inside = path.parent.name == checkpoint.DIRECTORY and path.name.isdecimal()
    return inside or faults.repeat((path / checkpoint.DIRECTORY).is_dir, path)


def _read_workdir(path: epath.Path, step: int | None) -> Weights:
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    net, variables, meta = checkpoint.load_model(path, mesh, step)
    origin = {"source": str(path), "format": "clip_jax", "step": meta["step"]}
    return Weights(net.size, of_variables(variables), _tokenizer(meta), origin)


def _tokenizer(meta: Mapping[str, Any]) -> TokenizerFile:
    return TokenizerFile.from_setting(meta["config"]["tokenizer"], meta["tokenizer"])


def locate(source: epath.PathLike) -> epath.Path:
    """Where a model lies, fetched from the Hugging Face hub where it is a name there.

    Raises:
      UserError: there is none.
    """
    path = locations.parse(source)
    if files.exists(path):
        return path
    if isinstance(source, str) and _HUB_NAME.fullmatch(source):
        return _from_hub(source)
    raise UserError(f"There is no {path}: give the workdir of a training run, or {_TAKES}.")


def _from_hub(name: str) -> epath.Path:
    """The folder of a model in the local cache, which is filled where it lacks it."""
    from huggingface_hub import snapshot_download

    for offline in (True, False):
        try:
            patterns = ["*.json", "*.txt", "*.model", "*.safetensors"]
            folder = snapshot_download(name, allow_patterns=patterns, local_files_only=offline)
        except Exception as error:  # of the network, the hub, or the name
            reason = str(error).strip().partition("\n")[0]
        else:
            if next(iter(Path(folder).glob("*.safetensors")), None):
                return epath.Path(folder)
            reason = "it has no safetensors file"
    raise UserError(
        f"There is no {name} here, and no model of that name can be had from the Hugging Face hub: "
        f"{reason}. Give {_TAKES}."
    )


# ---- Writing -----------------------------------------------------------------------------------


def _write_openai(weights: Weights, path: Path) -> None:
    files.check_held("OpenAI's format", openai.nearest(weights.size), weights.size)
    torch_files.write(files.export(openai.table(weights.size), weights), path)


# How a model is written locally, and the ending of the file; "": it is a folder.
FORMATS: dict[str, tuple[Callable[[Weights, Path], None], str]] = {
    "clip_jax": (write_folder, ""),
    "huggingface": (huggingface.write, ""),
    "open_clip": (open_clip.write, ""),
    "openai": (_write_openai, ".pt"),
    "big_vision": (big_vision.write, ".npz"),
}


def write(weights: Weights, target: epath.PathLike, to: str = "clip_jax") -> None:
    """Writes a model; what is not complete never has the target's name.

    Args:
      weights: to write.
      target: file or folder that is not there yet, local or in a bucket.
      to: a name in `FORMATS`.

    Raises:
      UserError: the target is there, its bucket is not, or the format has no such model.
    """
    function, ending = FORMATS[to]
    path = locations.parse(target)
    if files.exists(path):
        raise UserError(f"{path} is there already: name another target, or delete it first.")
    if ending and path.suffix != ending:
        raise UserError(f"{to} has files that end in {ending}: call the target {path}{ending}.")
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
        function(weights, local)
