"""Starting a run from a model that is there: another run's, or others' published weights."""

import dataclasses
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from clip_jax import models
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.errors import UserError
from clip_jax.models.resize import image_positions, resize_positions
from clip_jax.state import abstract_variables
from clip_jax.weights import convert
from clip_jax.weights.base import TokenizerFile, differences


def read(
    config: ConfigDict, net: models.ImageModel, mesh: Mesh, tokens: Tokenizer
) -> dict[str, Any]:
    """The variables that `config.init_from` names, at the resolution of `net`.

    Args:
      config: whose `init_from` is whatever `clip_jax.load` takes.
      net: that the config describes.
      mesh: where the parameters will live.
      tokens: that the config names.

    Raises:
      UserError: it holds another model than the config describes, or one of another tokenizer.
    """
    size, variables, file = convert.read_variables(config.init_from, mesh)
    _check(config, size, net.size, file, tokens)
    if size != net.size:
        length = image_positions(abstract_variables(net, mesh)["params"]).shape[0]
        variables = {**variables, "params": resize_positions(variables["params"], length)}
    return variables


def _check(
    config: ConfigDict,
    found: models.Size,
    wanted: models.Size,
    file: TokenizerFile,
    tokens: Tokenizer,
) -> None:
    """UserError, with the settings that would do, unless only the resolution differs."""
    wrong = differences(dataclasses.replace(found, image_size=wanted.image_size), wanted)
    settings = {
        name: f"model.size.{name}={str(getattr(found, name)).replace(' ', '')}"
        for name in wrong
        if name in config.model.size
    }
    if file.identity not in ("", tokens.identity):  # "": it came without one
        wrong["tokenizer"] = f"the tokenizer {file.identity}, not {tokens.identity}"
        settings["tokenizer"] = f"tokenizer={file.setting}"
    if wrong:
        flags = " ".join(f"--config.{setting}" for setting in settings.values())
        raise UserError(
            f"init_from {config.init_from} holds another model than the config names; only "
            f"image_size may differ: it has {'; '.join(wrong.values())}. "
            + (f"Add {flags}" if len(settings) == len(wrong) else "Take the config of that model")
            + "."
        )
