"""Frozen models that are distilled from: they embed each batch before the step.

They add fields to the batch that look like those that the data keep (`data.teachers`): the step and
its loss know no teachers. A teacher sees the augmented images of the student, resized to its own
resolution and normalised as it wants, and the student's tokens.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped, UInt8
from ml_collections import ConfigDict

from clip_jax import models, sharding, weights
from clip_jax.configs import default
from clip_jax.data import teachers as fields
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.errors import UserError
from clip_jax.training import objectives, program
from clip_jax.training import step as train_step
from clip_jax.weights.model import Weights

_RESIZES = {"bilinear": "linear", "bicubic": "cubic", "lanczos": "lanczos3"}


def open_teachers(
    config: ConfigDict, size: models.Size, tokenizer: Tokenizer
) -> tuple[Weights, ...]:
    """Opens the models that `loss.teachers` names; their arrays are read later.

    Args:
      config: the whole config.
      size: the student's.
      tokenizer: the student's.

    Raises:
      UserError: there is no such model, or it cannot read the student's batches.
    """
    opened = []
    for name in default.teacher_names(config):
        try:
            teacher = weights.open(name)
            _check(teacher, size, tokenizer)
            program.check_tensor(teacher.size, config.mesh.tensor)
        except UserError as error:
            raise UserError(f"loss.teachers names {name}: {error}") from None
        opened.append(teacher)
    return tuple(opened)


def _check(teacher: Weights, size: models.Size, tokenizer: Tokenizer) -> None:
    """Raises UserError where a teacher cannot embed the student's batches."""
    theirs = teacher.size
    if theirs.objective != "contrastive":
        raise UserError(
            f"it was trained for {theirs.objective}, and does not embed images and texts in one "
            "space. Take one that was trained with --config.objective=contrastive."
        )
    if teacher.tokenizer.identity != tokenizer.identity:
        known = teacher.tokenizer.identity
        remedy = "Name its vocabulary to `python -m clip_jax convert --tokenizer=...`"
        if known:
            remedy = f"Add --config.tokenizer={teacher.tokenizer.setting}"
        raise UserError(
            f"its tokenizer is {known or 'not known'}, the student's {tokenizer.identity}, and a "
            f"batch holds the ids of one. {remedy}, or take the teacher's embeddings from the data "
            "(data.source.teacher_keys)."
        )
    ours, own = size.context_length, theirs.context_length
    # What follows the end token changes nothing in a tower of this form, and may be missing.
    shorter = ours < own and theirs.text_causal and theirs.text_pool == "end"
    if ours != own and not shorter:
        raise UserError(
            f"it reads captions of {own} tokens, the student of {ours}: set "
            f"--config.model.size.context_length={own}."
        )


class Teachers:
    """Running teachers, compiled for the batches of a run.

    Attributes:
      scales: multiplier of the similarities by each.
      bytes: memory of a device that their parameters take, with a batch.
    """

    def __init__(self, opened: Sequence[Weights], built: program.Program):
        """Reads the parameters, on each device only its shards, and compiles.

        Args:
          opened: from `open_teachers`.
          built: program of the run.

        Raises:
          UserError: a model is damaged.
        """
        mesh, net = built.mesh, built.net
        self._variables = [teacher.variables(mesh) for teacher in opened]
        logarithms = (sharding.to_host(own["params"]["logit_scale"]) for own in self._variables)
        self.scales = tuple(math.exp(each) for each in logarithms)
        computed = {"dtype": net.dtype, "attention": net.attention}
        nets = [models.of_size(teacher.size).clone(**computed) for teacher in opened]
        embed = partial(_embed, nets, built)
        like = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
        taken = {name: built.batch[name] for name in ("image", "tokens")}
        with jax.set_mesh(mesh):
            jitted = jax.jit(embed, out_shardings=sharding.batch_sharding(mesh))
            self._embed = jitted.lower(self._variables, taken, like).compile()
        needs = self._embed.memory_analysis()
        self.bytes = needs.argument_size_in_bytes if needs else 0

    def __call__(self, batch: train_step.Batch, step: Int[Array, ""]) -> train_step.Batch:
        """Returns the batch of a step with the embeddings by all teachers."""
        taken = {name: batch[name] for name in ("image", "tokens")}
        return {**batch, **self._embed(self._variables, taken, step)}


def _embed(
    nets: Sequence[models.ImageModel],
    built: program.Program,
    variables: Sequence[Any],
    batch: train_step.Batch,
    step: Int[Array, ""],
) -> train_step.Batch:
    """Computes the fields of all teachers, with the activations of one micro-batch alive."""
    config = built.config
    _, augment_fn = objectives.OBJECTIVES[config.objective](config, built.mesh)
    images = augment_fn(batch["image"], train_step.keys(config.seed, step)[2])["image"]
    batch = {"image": images, "tokens": batch["tokens"]}
    first = len(fields.of_data(config.data))  # those that the data keep come first

    def embed(part: train_step.Batch) -> train_step.Batch:
        found: train_step.Batch = {}
        for number, (net, own) in enumerate(zip(nets, variables), start=first):
            resized = {**part, "image": resize(part["image"], net.size)}
            outputs: Any = net.apply(own, resized, method="outputs")
            image, text = fields.field_names(number)
            found |= {image: outputs["image"], text: outputs["text"]}
        return found

    if config.accum_steps == 1:
        return embed(batch)
    parts = jax.tree.map(partial(train_step.split, config.accum_steps), batch)
    return jax.tree.map(train_step.join, jax.lax.map(embed, parts))


def resize(
    images: Shaped[Array, "batch side side 3"], size: models.Size
) -> UInt8[Array, "batch new new 3"]:
    """Resizes square images, uint8 or floats from 0 to 255, with the filter of a model."""
    if images.shape[1] == size.image_size:
        return images
    shape = (len(images), size.image_size, size.image_size, 3)
    filter_ = _RESIZES[size.image_filter]
    resized = jax.image.resize(
        images.astype(jnp.float32), shape, filter_, precision=jax.lax.Precision.HIGHEST
    )
    return jnp.clip(jnp.round(resized), 0, 255).astype(jnp.uint8)
