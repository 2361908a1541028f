"""Folders of open_clip, with its own towers or one of timm's for images."""

import dataclasses
import json
import pathlib
import re

import numpy as np
from etils import epath

from clip_jax import models
from clip_jax.errors import UserError
from clip_jax.models import positions
from clip_jax.weights.convert import files, openai, timm_towers, tokens
from clip_jax.weights.convert.mapping import Entry, entry
from clip_jax.weights.convert.open_clip_settings import config_of, size_of
from clip_jax.weights.folder import save_safetensors
from clip_jax.weights.model import Tensors, Weights

CONFIG = "open_clip_config.json"
_POSITIONS = "visual.positional_embedding"


def is_folder(folder: epath.Path) -> bool:
    """Returns whether a folder has weights and settings of open_clip."""
    return all(files.find(folder, names) for names in ((CONFIG,), files.OPEN_CLIP))


def read(folder: epath.Path, tokenizer: str = "") -> files.ForeignWeights:
    """Opens a folder; `tokenizer` names another tokenizer than the one in it.

    Raises:
      UserError: a file is damaged, or a setting is not one of ours.
    """
    path = files.find(folder, files.OPEN_CLIP)
    assert path is not None
    config = files.read_json(folder / CONFIG)
    size = size_of(config, folder)
    theirs = files.without(files.open_tensors(path), openai.NO_WEIGHTS)
    if size.image_positions == "sincos":
        theirs = _without_positions(theirs, size, path)
    return files.ForeignWeights(
        size=size,
        tensors=theirs,
        table=table(size, config["model_cfg"].get("custom_text", False)),
        tokenizer=tokens.named(tokenizer, size) if tokenizer else tokens.find(folder, size),
        format="open_clip",
    )


def write(weights: Weights, folder: pathlib.Path) -> None:
    """Writes a folder that open_clip.create_model_and_transforms("local-dir:FOLDER") loads.

    Raises:
      UserError: open_clip has no such model.
    """
    if weights.size.image_rope and weights.size.map_projection:
        weights = _with_bias(weights)
    config = config_of(weights.size)
    files.check_expressible("open_clip", size_of(config, folder), weights.size)
    folder.mkdir(parents=True)
    text = config["model_cfg"]["text_cfg"]
    text |= tokens.write_open_clip(weights.tokenizer, weights.size, folder)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    theirs = files.export(table(weights.size, weights.size.image_pool == "map"), weights)
    if weights.size.image_positions == "sincos":
        theirs = _with_positions(theirs, weights.size)
    save_safetensors(theirs, folder / files.OPEN_CLIP[0], {"format": "pt"})


# ---- Names -------------------------------------------------------------------------------------


def table(size: models.Size, custom_text: bool) -> list[Entry]:
    """Returns the places of open_clip's tensors in ours.

    Args:
      size: shapes and forms of the model.
      custom_text: the names of the text tower have a prefix.
    """
    if not custom_text:
        return openai.table(size)
    if size.image_pool == "map":
        image = list(timm_towers.table(size))
        scalars = [entry(name, f"params/{name}") for name in ("logit_scale", "logit_bias")]
        scalars = scalars if size.logit_bias else scalars[:1]
        return [*image, *openai.text(size, "text."), *scalars]
    text = {row.name for row in openai.text(size, "")}
    return [
        Entry(f"text.{row.name}", row.pieces, row.form) if row.name in text else row
        for row in openai.table(size)
    ]


# ---- Fixed positions, which open_clip stores beside the weights ----------------------------------


def _fixed_positions(size: models.Size) -> np.ndarray:
    fixed = positions.sincos(size.patches_per_side, size.image_width)
    return np.concatenate([np.zeros((1, size.image_width), np.float32), fixed])  # a class token


def _without_positions(theirs: Tensors, size: models.Size, source: epath.Path) -> Tensors:
    """Returns the other tensors; UserError where the positions are not the fixed ones."""
    if _POSITIONS in theirs.shapes:
        found, fixed = np.asarray(theirs.read(_POSITIONS), np.float32), _fixed_positions(size)
        if found.shape != fixed.shape or np.abs(found - fixed).max() > 1e-4:
            raise UserError(
                f"{source} has vision_cfg.pos_embed_type = 'sin_cos_2d' in its settings, but other "
                f"numbers in {_POSITIONS}: set it to 'learnable' in {CONFIG}, and they are read."
            )
    return files.without(theirs, f"^{re.escape(_POSITIONS)}$")


def _with_positions(theirs: Tensors, size: models.Size) -> Tensors:
    fixed = _fixed_positions(size)
    shapes = {**theirs.shapes, _POSITIONS: fixed.shape}
    return Tensors(shapes, lambda name: fixed if name == _POSITIONS else theirs.read(name))


def _with_bias(weights: Weights) -> Weights:
    """Returns the model with a bias of zeros in its projection, as timm's PE has one."""
    name, size = "params/image/projection/bias", weights.size
    if size.image_projection_bias:
        return weights
    zeros = np.zeros(size.embed_dim, np.float32)
    tensors = Tensors(
        {**weights.tensors.shapes, name: zeros.shape},
        lambda asked: zeros if asked == name else weights.tensors.read(asked),
    )
    size = dataclasses.replace(size, image_projection_bias=True)
    return dataclasses.replace(weights, size=size, tensors=tensors)
