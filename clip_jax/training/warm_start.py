"""Starting a run from an existing model: another run's, or published weights."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from clip_jax import models, optim, weights
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.errors import UserError
from clip_jax.models.resize import image_positions, resize_positions, resize_text_positions
from clip_jax.state import abstract_variables
from clip_jax.weights.model import Weights, size_differences

# Beginnings of the names of a tower's fields in `models.Size`.
_FIELDS = {
    "image": ("image_", "patch_", "pre_norm", "resnet_"),
    "text": ("text_", "context_length", "vocab_size", "end_token"),
    "decoder": ("text_decoder_",),
    "view_head": ("views_",),
}


def initial_variables(
    config: ConfigDict, net: models.ImageModel, mesh: Mesh, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Returns the variables of the model `config.init_from`, its positions resized for `net`.

    Those that `config.init_params` leaves random are None.

    Args:
      config: config of the run; its `init_from` is whatever `weights.open` takes.
      net: module that the config describes.
      mesh: devices on which the parameters will live.
      tokenizer: tokenizer that the config names.

    Raises:
      UserError: it holds another model than the config describes, or one of another tokenizer.
    """
    opened = weights.open(config.init_from)
    wanted = optim.find(abstract_variables(net, mesh)["params"], config.init_params, "init_params")
    taken = {tower for tower, part in wanted.items() if any(jax.tree.leaves(part))}
    _check(config, opened, net.size, tokenizer, taken)
    variables = opened.variables(mesh)
    params = variables["params"]
    if "image" in taken and opened.size.image_size != net.size.image_size:
        learned = image_positions(abstract_variables(net, mesh)["params"])
        params = params if learned is None else resize_positions(params, learned.shape[0])
    length = net.size.context_length
    if "text" in taken and "positions" in params["text"]:
        text = params["text"]
        if len(text["positions"]) != length:
            text = {**text, "positions": resize_text_positions(text["positions"], length)}
        params = {**params, "text": text}
    if not config.init_params:
        return {**variables, "params": params}
    params = {tower: params.get(tower) for tower in wanted}
    batch_stats = variables["batch_stats"] if "image" in taken else None
    return {"params": _pick(wanted, params), "batch_stats": batch_stats}


def _pick(wanted: Any, params: Any) -> Any:
    """Returns the parameters that are wanted; the others, which may have any shape, are None."""
    if isinstance(wanted, dict):
        params = params or {}
        return {name: _pick(part, params.get(name)) for name, part in wanted.items()}
    return params if wanted else None


def _check(
    config: ConfigDict,
    opened: Weights,
    expected: models.Size,
    tokenizer: Tokenizer,
    taken: Collection[str],
) -> None:
    """Raises UserError, naming the settings that would do, unless only positions are resized.

    A tower of which nothing is taken may be another.
    """
    size, file = opened.size, opened.tokenizer
    free = {"image_size": expected.image_size, "context_length": expected.context_length}
    wrong = size_differences(dataclasses.replace(size, **free), expected)
    for tower in {*_FIELDS} - {*taken}:
        wrong = {name: why for name, why in wrong.items() if not name.startswith(_FIELDS[tower])}
    settings = {
        name: f"model.size.{name}={str(getattr(size, name)).replace(' ', '')}"
        for name in wrong
        if name in config.model.size
    }
    other = file.identity not in ("", tokenizer.identity)  # "": it came without one
    if other and "text" in taken:
        wrong["tokenizer"] = f"the tokenizer {file.identity}, not {tokenizer.identity}"
        settings["tokenizer"] = f"tokenizer={file.setting}"
    if wrong:
        flags = " ".join(f"--config.{setting}" for setting in settings.values())
        raise UserError(
            f"init_from {config.init_from} holds another model than the config names; only "
            f"image_size and context_length may differ: it has {'; '.join(wrong.values())}. "
            + (f"Add {flags}." if len(settings) == len(wrong) else "Take the config of that model.")
        )
