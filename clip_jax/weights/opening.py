"""Opening a model by the name of a workdir, checkpoint, folder, file, or one on the hub."""

import dataclasses
import functools
import pathlib
import re

import huggingface_hub
import jax
import numpy as np
from etils import epath

from clip_jax import checkpoint, models, sharding
from clip_jax.errors import UserError
from clip_jax.state import abstract_variables
from clip_jax.storage import faults, locations, remote
from clip_jax.weights import folder
from clip_jax.weights.convert import files, formats
from clip_jax.weights.model import (
    Tensors,
    TokenizerFile,
    Variables,
    Weights,
    size_differences,
    variable_shapes,
    variables_by_path,
)

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Names on the Hugging Face hub; OpenAI's ResNets are published as archives only.
_PUBLISHED = {
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
    "ViT-H/14": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "ViT-g/14": "laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
    "SigLIP-B/16": "google/siglip-base-patch16-224",
    "SigLIP-So400m/14": "google/siglip-so400m-patch14-224",
    "SigLIP2-B/16": "google/siglip2-base-patch16-224",
    "MetaCLIP2-H/14": "facebook/metaclip-2-worldwide-huge-quickgelu",
    "CLIPA-L/14": "UCSC-VLAA/ViT-L-14-CLIPA-datacomp1B",
    "CLIPA-H/14": "UCSC-VLAA/ViT-H-14-CLIPA-datacomp1B",
    "PE-Core-B/16": "timm/PE-Core-B-16",
    "PE-Core-L/14@336px": "timm/PE-Core-L-14-336",
}


def open_model(
    source: epath.PathLike, step: int | None, model: str, activation: str, tokenizer: str
) -> Weights:
    """Opens a model as `weights.open`, which documents the arguments."""
    path = _locate(source)
    if _is_workdir(path):
        weights = _open_workdir(path, step)
    elif folder.is_folder(path):
        weights = folder.read(path)
    else:
        try:
            weights = formats.read(path, model, activation, tokenizer)
        except (TypeError, KeyError, AttributeError, ArithmeticError) as error:
            # Whatever a setting of another type makes of what reads it.
            raise UserError(
                f"{source} cannot be read: a setting in it is missing or not of the kind that it "
                f"should be ({type(error).__name__}: {error})."
            ) from error
    if activation:
        size = dataclasses.replace(weights.size, activation=activation, text_activation=None)
        weights = dataclasses.replace(weights, size=size)
    if model and (wrong := size_differences(weights.size, models.get_size(model))):
        raise UserError(
            f"{source} is not {model}: it has {'; '.join(wrong.values())}. Leave --model out to "
            "take it as it is."
        )
    return weights


# ---- Workdirs ----------------------------------------------------------------------------------


# Behind the path of a workdir or checkpoint: the moving average of the parameters.
EMA = "ema"


def _split_ema(path: epath.Path) -> tuple[epath.Path, bool]:
    return (path.parent, True) if path.name == EMA else (path, False)


def _is_workdir(path: epath.Path) -> bool:
    workdir, step = checkpoint.split_path(_split_ema(path)[0])
    return step is not None or faults.repeat((workdir / checkpoint.DIRECTORY).is_dir, path)


def _open_workdir(path: epath.Path, step: int | None) -> Weights:
    """Reads the description that a checkpoint was saved with; its arrays later.

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    path, ema = _split_ema(path)
    workdir, named = checkpoint.split_path(path)
    step = step if named is None else named
    with checkpoint.Checkpoints(workdir, create=False) as store:
        steps = store.steps()
        if not steps or (step is not None and step not in steps):
            raise UserError(
                f"{workdir} holds no finished checkpoint"
                + (f" {step}; it has {steps}." if steps else " yet.")
            )
        step = steps[-1] if step is None else step
        meta = store.read_meta(step)
    if ema and not meta["config"]["optim"].get("ema_decay"):
        raise UserError(
            f"The run in {workdir} keeps no moving average of its parameters: give {path}, or "
            "train with --config.optim.ema_decay=0.9999."
        )
    return Weights(
        size=models.Size.from_json(meta["size"]),
        tensors=_checkpoint_tensors(workdir, step, models.Size.from_json(meta["size"]), ema),
        tokenizer=TokenizerFile.from_setting(meta["config"]["tokenizer"], meta["tokenizer"]),
        origin={
            "source": str(path / EMA if ema else path),
            "format": "clip_jax",
            "step": meta["step"],
        },
    )


def _checkpoint_tensors(workdir: epath.Path, step: int, size: models.Size, ema: bool) -> Tensors:
    """Returns the tensors of a checkpoint; the first one that is read brings all into memory."""

    def restore(like: Variables) -> Variables:
        with checkpoint.Checkpoints(workdir, create=False) as store:
            return store.restore_variables(step, like, ema)

    @functools.cache
    def arrays() -> dict[str, jax.Array]:
        mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
        return variables_by_path(restore(abstract_variables(models.of_size(size), mesh)))

    return Tensors(
        variable_shapes(size), lambda name: np.asarray(arrays()[name], np.float32), restore
    )


# ---- Paths and the hub -------------------------------------------------------------------------


def _locate(source: epath.PathLike) -> epath.Path:
    """Returns the path of a model, downloaded if it is a name on the Hugging Face hub.

    Raises:
      UserError: there is none.
    """
    path = locations.parse(source)
    if files.exists(path) or (path.name == EMA and _is_workdir(path)):
        return path
    if str(source) in models.available_models():
        raise UserError(_how_to_get(str(source)))
    if _is_hub_name(source):
        return _download(str(source))
    there = "" if remote.is_remote(path) else f", looked for at {pathlib.Path(path).absolute()}"
    raise UserError(
        f"There is no model {str(source)!r}{there}: give the workdir of a training run, "
        f"{formats.READABLE}."
    )


def _is_hub_name(source: epath.PathLike) -> bool:
    """Returns whether a missing path can only be a name on the hub, ORG/NAME.

    It is one of this machine where ORG is a folder here, or where NAME ends as a file does.
    """
    if not isinstance(source, str) or not _HUB_NAME.fullmatch(source):
        return False
    parent, name = source.split("/")
    suffix = pathlib.PurePath(name).suffix
    is_file = suffix in (*files.TORCH, ".npz", ".safetensors", ".json")
    return not is_file and not pathlib.Path(parent).exists()


def _how_to_get(name: str) -> str:
    """Describes where weights of a named model are published."""
    size = models.get_size(name)
    ways = []
    if name in _PUBLISHED:
        ways.append(f"{_PUBLISHED[name]}, a name on the Hugging Face hub")
    if size.activation == "quick_gelu" and size.end_token is None:
        file = name.replace("/", "-").replace("@", "-")
        ways.append(
            f"OpenAI's archive {file}.pt, whose address is in clip/clip.py of "
            "https://github.com/openai/CLIP"
        )
    return (
        f"{name} names an architecture, and no weights come with clip_jax. Give their place: "
        f"{'; or '.join(ways)}. A workdir of your own does as well."
    )


def _download(name: str) -> epath.Path:
    """Returns the folder of a model in the local cache, filled from the hub where it lacks it."""
    for offline in (True, False):
        try:
            patterns = ["*.json", "*.txt", "*.model", "*.safetensors"]
            cached = huggingface_hub.snapshot_download(
                name, allow_patterns=patterns, local_files_only=offline
            )
        except Exception as error:  # an error of the network, the hub, or the name
            reason = str(error).strip().partition("\n")[0]
        else:
            if next(iter(pathlib.Path(cached).glob("*.safetensors")), None):
                return epath.Path(cached)
            reason = "it has no safetensors file"
    raise UserError(
        f"There is no {name} here, and no model of that name can be had from the Hugging Face hub: "
        f"{reason}. Give {formats.READABLE}."
    )
