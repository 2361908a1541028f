"""Starting a run from an existing model: another run's, or published weights."""

import dataclasses
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from clip_jax import models, weights
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.errors import UserError
from clip_jax.models.resize import image_positions, resize_positions
from clip_jax.state import abstract_variables
from clip_jax.weights.model import Weights, size_differences


def initial_variables(
    config: ConfigDict, net: models.ImageModel, mesh: Mesh, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Returns the variables of the model `config.init_from`, at the resolution of `net`.

    Args:
      config: config of the run; its `init_from` is whatever `weights.open` takes.
      net: module that the config describes.
      mesh: devices on which the parameters will live.
      tokenizer: tokenizer that the config names.

    Raises:
      UserError: it holds another model than the config describes, or one of another tokenizer.
    """
    opened = weights.open(config.init_from)
    _check(config, opened, net.size, tokenizer)
    variables = opened.variables(mesh)
    learned = image_positions(abstract_variables(net, mesh)["params"])
    if opened.size != net.size and learned is not None:
        params = resize_positions(variables["params"], learned.shape[0])
        variables = {**variables, "params": params}
    return variables


def _check(
    config: ConfigDict, opened: Weights, expected: models.Size, tokenizer: Tokenizer
) -> None:
    """Raises UserError, naming the settings that would do, unless only the resolution differs."""
    size, file = opened.size, opened.tokenizer
    wrong = size_differences(dataclasses.replace(size, image_size=expected.image_size), expected)
    settings = {
        name: f"model.size.{name}={str(getattr(size, name)).replace(' ', '')}"
        for name in wrong
        if name in config.model.size
    }
    if file.identity not in ("", tokenizer.identity):  # "": it came without one
        wrong["tokenizer"] = f"the tokenizer {file.identity}, not {tokenizer.identity}"
        settings["tokenizer"] = f"tokenizer={file.setting}"
    if wrong:
        flags = " ".join(f"--config.{setting}" for setting in settings.values())
        raise UserError(
            f"init_from {config.init_from} holds another model than the config names; only "
            f"image_size may differ: it has {'; '.join(wrong.values())}. "
            + (f"Add {flags}" if len(settings) == len(wrong) else "Take the config of that model")
            + _conversion(config, wrong, expected)
        )


def _conversion(config: ConfigDict, wrong: dict[str, str], expected: models.Size) -> str:
    """Returns the end of the message: the command that changes the length of captions."""
    if set(wrong) != {"context_length"}:
        return "."
    target = f"{str(config.init_from).rstrip('/')}-{expected.context_length}"
    return (
        f"; or change the model: python -m clip_jax convert {config.init_from} {target} "
        f"--context_length={expected.context_length}, and then --config.init_from={target}."
    )
