"""The objectives that a model is trained for: the loss of each, and the augmentation."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from clip_jax import losses
from clip_jax.data import teachers
from clip_jax.models import clip, image_model, views
from clip_jax.training import augment
from clip_jax.training import step as train_step

Parts = tuple[train_step.Objective, train_step.Augment]


def of_pairs(loss: Callable[..., jax.Array]) -> train_step.Loss:
    """Makes a contrastive loss, as `losses.softmax_loss`, one of named outputs and the batch."""

    def named(outputs: train_step.Outputs, batch: train_step.Batch) -> jax.Array:
        pairs = [outputs[name] for name in clip.PAIRS if name in outputs]
        weights = {"weights": batch["weight"]} if "weight" in batch else {}
        return loss(*pairs, **weights)

    return named


def of_views(loss: Callable[..., jax.Array]) -> train_step.Loss:
    """Makes a contrastive loss, whose scale is fixed, one of two views of each image."""
    return lambda outputs, batch: loss(*jnp.unstack(outputs["views"], axis=1))


def prediction(outputs: train_step.Outputs, batch: train_step.Batch) -> jax.Array:
    """Computes the loss of a model that predicts captions, weighed like their pairs."""
    weights = batch.get("weight", 1.0)
    return losses.prediction_loss(weights * outputs["nats"], weights * outputs["predicted"])


def of_teachers(loss: Callable[..., jax.Array], scales: Sequence[float]) -> train_step.Loss:
    """Makes a loss of distillation, as `losses.distillation_loss`, one of named outputs and batch.

    Args:
      loss: loss of distillation.
      scales: multiplier of the similarities by each teacher of the batch.
    """

    def named(outputs: train_step.Outputs, batch: train_step.Batch) -> jax.Array:
        theirs = []
        for number, scale in enumerate(scales):
            image, text = teachers.field_names(number)
            theirs.append((batch[image], batch[text], jnp.float32(math.log(scale))))
        pairs = outputs["image"], outputs["text"], outputs["logit_scale"]
        return loss(*pairs, theirs, weights=batch.get("weight"))

    return named


def weighted_sum(**terms: tuple[float, train_step.Loss]) -> train_step.Objective:
    """Makes the sum of named losses, each times its weight; those of weight 0 are not computed."""
    terms = {name: term for name, term in terms.items() if term[0]}

    def total(
        outputs: train_step.Outputs, batch: train_step.Batch
    ) -> tuple[jax.Array, train_step.Metrics]:
        values = {name: loss(outputs, batch) for name, (_, loss) in terms.items()}
        value = sum((terms[name][0] * values[name] for name in terms), jnp.float32(0))
        return value, {f"loss/{name}": values[name] for name in terms if len(terms) > 1}

    return total


def _contrastive(config: ConfigDict, mesh: Mesh) -> Parts:
    def on_mesh(loss):
        return functools.partial(loss, mesh=mesh, method=config.loss.method, tile=config.loss.tile)

    loss = on_mesh(losses.LOSSES[config.loss.name])
    distillation = of_teachers(on_mesh(losses.distillation_loss), config.loss.teacher_scales)
    if config.loss.label_smoothing:
        loss = functools.partial(loss, label_smoothing=config.loss.label_smoothing)
    if config.loss.widths:
        loss = functools.partial(_nested, loss, tuple(config.loss.widths))

    def compare_views(outputs: train_step.Outputs, batch: train_step.Batch) -> jax.Array:
        scale = jnp.float32(-math.log(config.loss.views_temperature))
        of_views = on_mesh(losses.views_loss)
        return of_views(outputs["views"], scale, weights=batch.get("weight"))

    total = weighted_sum(
        contrastive=(1.0 - config.loss.distillation, of_pairs(loss)),
        distillation=(config.loss.distillation, distillation),
        captioning=(config.loss.captioning, prediction),
        views=(config.loss.views, compare_views),
    )
    return total, _augmentation(config, with_views=config.loss.views > 0)


def _augmentation(config: ConfigDict, with_views: bool) -> train_step.Augment:
    """Makes the augmentation of the images, and of two further views of each that stand beside."""

    def change(images: jax.Array, key: jax.Array) -> train_step.Batch:
        fields = {"image": augment.augment(images, key, config=config.data.augment)}
        if with_views:
            _, key = jax.random.split(key)
            fields["views"] = views.two_views(images, key, config.data.views)
        return fields

    return change


def _nested(
    loss: Callable[..., jax.Array],
    widths: tuple[int, ...],
    images: jax.Array,
    texts: jax.Array,
    *scalars: jax.Array,
    **settings: Any,
) -> jax.Array:
    """Adds the losses of the first features alone, L2-normalised again, to that of all of them.

    Matryoshka representations (Kusupati et al. 2022, arXiv:2205.13147).

    Args:
      loss: contrastive loss, with the keyword arguments `settings`.
      widths: numbers of features.
      images, texts, scalars: outputs of the model.
    """
    total = loss(images, texts, *scalars, **settings)
    for width in widths:
        cut = (image_model.l2_normalize(embeds[..., :width]) for embeds in (images, texts))
        total += loss(*cut, *scalars, **settings)
    return total


def _predictive(config: ConfigDict, mesh: Mesh) -> Parts:
    del mesh
    return weighted_sum(prediction=(1.0, prediction)), _augmentation(config, with_views=False)


def _near_duplicates(config: ConfigDict, mesh: Mesh) -> Parts:
    scale = jnp.float32(-math.log(config.loss.temperature))
    loss = functools.partial(
        losses.softmax_loss,
        logit_scale=scale,
        mesh=mesh,
        method=config.loss.method,
        tile=config.loss.tile,
    )

    def change(images: jax.Array, key: jax.Array) -> train_step.Batch:
        return {"image": views.two_views(images, key, config.data.views)}

    return weighted_sum(views=(1.0, of_views(loss))), change


# By config.objective, one of `choices.OBJECTIVES`: its loss and its augmentation. The model is the
# one of that name in `models.MODULES`.
OBJECTIVES: Mapping[str, Callable[[ConfigDict, Mesh], Parts]] = {
    "contrastive": _contrastive,
    "captioning": _predictive,
    "bag_of_words": _predictive,
    "near_duplicates": _near_duplicates,
}
