"""The distillation loss, in tiles or with all texts gathered: similarities as their teachers' are.

Both forms take the same two passes. The first finds maximum and sum of each row and each column of
the logits, of the student and of every teacher; the second, which only a gradient needs, the
distributions. Gathered, the compiler computes the products of both passes once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from clip_jax.losses import ring
from clip_jax.losses.terms import (
    WHOLE,
    Axes,
    Images,
    Scalar,
    Texts,
    Weights,
    by_caption,
    dot,
    scale_gradients,
)

# Embeddings by model, the student's first and those of K teachers behind it: images [n, e] or texts
# [m, e], of any widths.
Embeds = tuple[Float[Array, "_ _"], ...]
Scales = tuple[Scalar, ...]  # natural logarithms of the multipliers, by model
TextWeights = Float[Array, " m"] | None
Moving = tuple[Embeds, TextWeights]  # texts of all models, and their weights
Logits = Float[Array, "n m"]
# Of each row or column of the logits, by model: the maximum; the sum of the exponentials from
# there; and, of a teacher, that sum weighted by its logits less the student's.
Sums = tuple[tuple[Float[Array, " _"], ...], ...]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def distillation(
    mesh: Mesh | None,
    axes: Axes,
    tile: int,
    images: Images,
    texts: Texts,
    logit_scale: Scalar,
    teachers: tuple[Embeds, Embeds, Scales],
    weights: Weights,
) -> Scalar:
    """Computes `losses.distillation_loss`; tile 0: with all texts gathered."""
    arguments = images, texts, logit_scale, teachers, weights
    return _on_devices(mesh, axes, partial(_loss, tile), arguments, WHOLE)


def _forward(
    mesh: Mesh | None,
    axes: Axes,
    tile: int,
    images: Images,
    texts: Texts,
    logit_scale: Scalar,
    teachers: tuple[Embeds, Embeds, Scales],
    weights: Weights,
) -> tuple[Scalar, tuple[Images, Texts, Scalar]]:
    split = PartitionSpec(axes)
    out_specs = WHOLE, (split, split, WHOLE)
    arguments = images, texts, logit_scale, teachers, weights
    return _on_devices(mesh, axes, partial(_loss_and_gradients, tile), arguments, out_specs)


def _backward(
    mesh: Mesh | None,
    axes: Axes,
    tile: int,
    residuals: tuple[Images, Texts, Scalar],
    gradient: Scalar,
) -> tuple[Float[Array, "..."] | None, ...]:
    del mesh, axes, tile
    return *scale_gradients(residuals, gradient), None, None


distillation.defvjp(_forward, _backward)


def _on_devices(
    mesh: Mesh | None, axes: Axes, local: Callable, arguments: tuple, out_specs: Any
) -> Any:
    """Calls `local(axes, images, texts, scales, weights)` on every device's part of the models."""
    images, texts, logit_scale, (image_embeds, text_embeds, scales), weights = arguments
    models = (images, *image_embeds), (texts, *text_embeds), (logit_scale, *scales), weights
    return ring.on_devices(mesh, axes, local, "ssws", out_specs)(*models)


def _loss(
    tile: int, axes: Axes, images: Embeds, texts: Embeds, scales: Scales, weights: Weights
) -> Scalar:
    moving = _moving(tile, axes, images, texts, weights)
    return _divergence(axes, weights, moving[1], *_sums(tile, axes, images, moving, scales))


def _loss_and_gradients(
    tile: int, axes: Axes, images: Embeds, texts: Embeds, scales: Scales, weights: Weights
) -> tuple[Scalar, tuple[Images, Texts, Scalar]]:
    moving = _moving(tile, axes, images, texts, weights)
    by_row, by_column = _sums(tile, axes, images, moving, scales)
    loss = _divergence(axes, weights, moving[1], by_row, by_column)
    captions = texts[0].shape[0] // images[0].shape[0]

    def visit(fixed, fixed_sums, moving, moving_sums):
        (images, of_rows, by_row), ((texts, of_columns), by_column) = fixed, moving
        logits = _logits(images, texts, scales)
        rows = _excess(logits, by_row, lambda x: x[:, None])
        columns = _excess(logits, by_column, lambda x: x[None])
        rows = rows if of_rows is None else of_rows[:, None] * rows
        columns = columns if of_columns is None else of_columns[None] * columns
        d_logits = rows + columns / captions
        rounded = d_logits.astype(images[0].dtype)
        d_images, d_scale = fixed_sums
        d_images += dot("nm,me->ne", rounded, texts[0])
        d_texts = moving_sums + dot("nm,ne->me", rounded, images[0])
        return (d_images, d_scale + jnp.sum(d_logits * logits[0], axis=1)), d_texts

    fixed_sums = jnp.zeros(images[0].shape), jnp.zeros(len(images[0]))
    (d_images, d_scale), d_texts = _sweep(
        tile,
        axes,
        visit,
        (images, weights, by_row),
        fixed_sums,
        (moving, by_column),
        jnp.zeros(moving[0][0].shape),
    )
    if not tile and axes:
        d_texts = jax.lax.psum_scatter(d_texts, axes, tiled=True)
    per_logit = 1 / (2 * len(images[0]) * ring.count_devices(axes))
    factor = jnp.exp(scales[0]) * per_logit
    return loss, (
        (factor * d_images).astype(images[0].dtype),
        (factor * d_texts).astype(texts[0].dtype),
        per_logit * ring.sum_over(jnp.sum(d_scale), axes),
    )


def _moving(tile: int, axes: Axes, images: Embeds, texts: Embeds, weights: Weights) -> Moving:
    """Returns the texts and their weights; gathered, those of all devices."""
    moving = texts, by_caption(weights, texts[0].shape[0] // images[0].shape[0])
    return moving if tile or not axes else jax.lax.all_gather(moving, axes, tiled=True)


def _sweep(tile: int, axes: Axes, visit: ring.Visit, fixed, fixed_sums, moving, moving_sums):
    """Visits all pairs, as `ring.sweep`; gathered, they are one tile, and nothing travels."""
    if not tile:
        return visit(fixed, fixed_sums, moving, moving_sums)
    tile = ring.tile_rows(len(fixed[0][0]), tile)
    return ring.sweep(axes, tile, visit, fixed, fixed_sums, moving, moving_sums)


def _logits(images: Embeds, texts: Embeds, scales: Scales) -> tuple[Logits, ...]:
    pairs = zip(images, texts, scales)
    return tuple(jnp.exp(scale) * dot("ne,me->nm", image, text) for image, text, scale in pairs)


def _sums(
    tile: int,
    axes: Axes,
    images: Embeds,
    moving: Moving,
    scales: Scales,
) -> tuple[Sums, Sums]:
    """Computes the sums of each of this device's rows, and of each of the moving columns."""

    def add(sums: Sums, logits: tuple[Logits, ...], axis: int) -> Sums:
        return tuple(
            _add(of_model, each, None if each is logits[0] else each - logits[0], axis)
            for of_model, each in zip(sums, logits)
        )

    def visit(fixed, fixed_sums, moving, moving_sums):
        logits = _logits(fixed[0], moving[0], scales)
        return add(fixed_sums, logits, 1), add(moving_sums, logits, 0)

    def empty(embeds: Embeds) -> Sums:
        rows = len(embeds[0])
        student = jnp.full(rows, -jnp.inf), jnp.zeros(rows)
        return (student, *[(*student, jnp.zeros(rows))] * (len(embeds) - 1))

    by_row, by_column = _sweep(
        tile, axes, visit, (images,), empty(images), (moving[0],), empty(moving[0])
    )
    if not tile and axes:  # columns run over all devices
        by_column = tuple(_joined(axes, *each) for each in by_column)
    return by_row, by_column


def _add(sums: tuple, logits: Logits, difference: Logits | None, axis: int) -> tuple:
    """Adds logits to the sums of one model, which are scaled down where the maximum rises."""
    old_max, *totals = sums
    new_max = jnp.maximum(old_max, logits.max(axis))
    terms = [jnp.exp(logits - jnp.expand_dims(new_max, axis))]
    if difference is not None:
        terms.append(terms[0] * difference)
    shrunk = jnp.exp(old_max - new_max)
    return new_max, *(total * shrunk + term.sum(axis) for total, term in zip(totals, terms))


def _joined(axes: Axes, maximum: Float[Array, " m"], *totals: Float[Array, " m"]) -> tuple:
    """Joins the sums that the devices have of the same columns."""
    new_max = jax.lax.pmax(maximum, axes)
    shrunk = jnp.exp(maximum - new_max)
    return new_max, *(jax.lax.psum(total * shrunk, axes) for total in totals)


def _divergence(
    axes: Axes, of_rows: Weights, of_columns: TextWeights, by_row: Sums, by_column: Sums
) -> Scalar:
    """Computes the mean over both directions, all devices and all teachers."""

    def mean(sums: Sums, weights: Weights) -> Scalar:
        (student_max, student_sum), *teachers = sums
        terms = [
            difference / total - (maximum - student_max) + jnp.log(student_sum / total)
            for maximum, total, difference in teachers
        ]
        terms = sum(terms) / len(terms)
        return jnp.mean(terms if weights is None else weights * terms)

    loss = (mean(by_row, of_rows) + mean(by_column, of_columns)) / 2
    return ring.sum_over(loss, axes) / ring.count_devices(axes)


def _excess(logits: tuple[Logits, ...], sums: Sums, spread: Callable) -> Logits:
    """Returns the student's probabilities less the mean of the teachers'."""
    student, *teachers = (
        jnp.exp(each - spread(maximum)) * spread(1 / total)
        for each, (maximum, total, *_) in zip(logits, sums)
    )
    return student - sum(teachers) / len(teachers)
