"""Losses that hold one tile of logits at a time: the texts travel in a ring of devices.

Each device keeps its images; the texts and the sums over their columns travel round all devices and
return. Every tile of the logits is computed once on the way, for both directions.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from clip_jax.errors import UserError
from clip_jax.losses.terms import (
    WHOLE,
    Axes,
    Images,
    Scalar,
    Texts,
    Weights,
    by_caption,
    dot,
    hide_twins,
    pair_weights,
    scale_gradients,
    sigmoid_terms,
)

OfImages, OfTexts = Float[Array, " n"], Float[Array, " m"]  # one for each of a device's
Tree = Any  # arrays whose first dimension is a device's images, or its texts
# (fixed, fixed_sums, moving, moving_sums) of one pair of tiles -> (fixed_sums, moving_sums).
Visit = Callable[[Tree, Tree, Tree, Tree], tuple[Tree, Tree]]


def sweep(
    axes: Axes,
    tile: int,
    visit: Visit,
    fixed: Tree,
    fixed_sums: Tree,
    moving: Tree,
    moving_sums: Tree,
) -> tuple[Tree, Tree]:
    """Visits every pair of tiles once, over all devices of the axes.

    Args:
      axes: mesh axes, outermost first; (): this device alone.
      tile: rows of a tile; divides the rows of `fixed` and of `moving`.
      visit: called with each pair of tiles.
      fixed: arrays that stay here and are only read.
      fixed_sums: arrays that stay here and are summed up.
      moving: arrays that travel and are only read.
      moving_sums: arrays that travel and are summed up.

    Returns:
      `fixed_sums`, and `moving_sums` after its way round all devices.
    """
    # Rings are nested: texts go round the innermost axis (the fastest network) before they take one
    # hop on the next one out, so that the slowest network carries each text the fewest times.
    spans = [(axis, jax.lax.axis_size(axis)) for axis in axes]

    def travel(spans, fixed_sums, moving, moving_sums):
        if not spans:
            fixed_sums, moving_sums = _visit_tiles(
                tile, visit, fixed, fixed_sums, moving, moving_sums
            )
            return fixed_sums, moving, moving_sums
        (axis, size), inner = spans[0], spans[1:]
        onwards = [(i, (i + 1) % size) for i in range(size)]

        def hop(_, carry):
            fixed_sums, moving, moving_sums = travel(inner, *carry)
            # On the innermost axis, arrays that are only read leave before the visit ends: transfer
            # overlaps with compute.
            moving, moving_sums = jax.lax.ppermute((moving, moving_sums), axis, onwards)
            return fixed_sums, moving, moving_sums

        return jax.lax.fori_loop(0, size, hop, (fixed_sums, moving, moving_sums))

    spans = [span for span in spans if span[1] > 1]
    fixed_sums, _, moving_sums = travel(spans, fixed_sums, moving, moving_sums)
    return fixed_sums, moving_sums


def _visit_tiles(
    tile: int, visit: Visit, fixed: Tree, fixed_sums: Tree, moving: Tree, moving_sums: Tree
) -> tuple[Tree, Tree]:
    """Visits all pairs of tiles that lie on this device; returns (fixed_sums, moving_sums)."""
    if max(x.shape[0] for x in jax.tree.leaves((fixed, moving))) <= tile:
        return visit(fixed, fixed_sums, moving, moving_sums)

    def split(tree):
        return jax.tree.map(lambda x: x.reshape(x.shape[0] // tile, tile, *x.shape[1:]), tree)

    def join(tree):
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)

    def column(fixed_sums, moving_tile):
        def row(moving_sums, fixed_tile):
            fixed, fixed_sums = fixed_tile
            fixed_sums, moving_sums = visit(fixed, fixed_sums, moving, moving_sums)
            return moving_sums, fixed_sums

        moving, moving_sums = moving_tile
        moving_sums, fixed_sums = jax.lax.scan(row, moving_sums, (split(fixed), fixed_sums))
        return fixed_sums, moving_sums

    fixed_sums, moving_sums = jax.lax.scan(
        column, split(fixed_sums), (split(moving), split(moving_sums))
    )
    return join(fixed_sums), join(moving_sums)


def tile_rows(rows: int, tile: int) -> int:
    """Returns the largest tile that divides a device's rows."""
    largest = next(size for size in range(min(rows, max(tile, 1)), 0, -1) if rows % size == 0)
    if largest < min(rows, tile) / 8:
        raise UserError(
            f"The {rows} examples of a device split into tiles of {largest} at most, if those are "
            f"to stay within loss.tile={tile}: take a batch_size that powers of two divide."
        )
    return largest


def on_devices(
    mesh: Mesh | None, axes: Axes, local: Callable, in_specs: str, out_specs: Any
) -> Callable:
    """Returns `local(axes, *arrays)` on every device of a mesh; None: on this one.

    Args:
      mesh: devices; None: this one, with axes ().
      axes: mesh axes that split the batch.
      local: function of a device's part of the arrays.
      in_specs: a letter per array; "s": split over the batch, "w": whole.
      out_specs: see `jax.shard_map`.
    """
    if mesh is None:
        return partial(local, ())
    split = PartitionSpec(axes)
    return jax.shard_map(
        partial(local, axes),
        mesh=mesh,
        in_specs=tuple(split if spec == "s" else WHOLE for spec in in_specs),
        out_specs=out_specs,
        check_vma=False,  # the loops' sums begin as constants; tests compare every result
    )


def sum_over(x: Float[Array, "..."], axes: Axes) -> Float[Array, "..."]:
    """Returns the sum over the devices of these axes."""
    return jax.lax.psum(x, axes) if axes else x


def _device(axes: Axes) -> Int[Array, ""] | int:
    return jax.lax.axis_index(axes) if axes else 0


def count_devices(axes: Axes) -> int:
    """Counts the devices along these axes."""
    return jax.lax.axis_size(axes) if axes else 1


def _positions(
    axes: Axes, images: Images, texts: Texts
) -> tuple[Int[Array, " n"], Int[Array, " m"]]:
    """Returns the places in the batch of this device's images, and of each text's image."""
    captions = len(texts) // len(images)

    def places(rows):
        return _device(axes) * rows + jnp.arange(rows)

    return places(len(images)), places(len(texts)) // captions


# --- softmax ---


def _softmax_statistics(
    axes: Axes, tile: int, twins: bool, images: Images, texts: Texts, logit_scale: Scalar
) -> tuple[tuple[OfImages, OfImages], tuple[OfTexts, OfTexts], OfImages]:
    """Computes maximum and sum of each own row and each own column, and the rows' positives."""

    def update_statistics(statistics, logits, axis):
        """Adds logits to maxima and sums, which are scaled down where the maximum rises."""
        old_max, old_sum = statistics
        new_max = jnp.maximum(old_max, logits.max(axis))
        summed = jnp.exp(logits - jnp.expand_dims(new_max, axis)).sum(axis)
        return new_max, old_sum * jnp.exp(old_max - new_max) + summed

    def visit(fixed, fixed_sums, moving, moving_sums):
        (images, image_rows), (texts, text_rows) = fixed, moving
        by_row, positives = fixed_sums
        logits = jnp.exp(logit_scale) * dot("ne,me->nm", images, texts)
        if twins:
            logits = hide_twins(logits, image_rows, text_rows)
        is_positive = image_rows[:, None] == text_rows[None]
        positives += jnp.sum(jnp.where(is_positive, logits, 0), axis=1)
        return (update_statistics(by_row, logits, 1), positives), update_statistics(
            moving_sums, logits, 0
        )

    def empty_statistics(rows):
        return jnp.full(rows, -jnp.inf), jnp.zeros(rows)

    image_rows, text_rows = _positions(axes, images, texts)
    (by_row, positives), by_column = sweep(
        axes,
        tile,
        visit,
        (images, image_rows),
        (empty_statistics(len(images)), jnp.zeros(len(images))),
        (texts, text_rows),
        empty_statistics(len(texts)),
    )
    return by_row, by_column, positives


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def softmax(
    mesh: Mesh | None,
    axes: Axes,
    tile: int,
    twins: bool,
    images: Images,
    texts: Texts,
    logit_scale: Scalar,
    weights: Weights,
) -> Scalar:
    """Computes `losses.softmax_loss` in tiles."""
    return _softmax_forward(mesh, axes, tile, twins, images, texts, logit_scale, weights)[0]


def _softmax_forward(
    mesh: Mesh | None,
    axes: Axes,
    tile: int,
    twins: bool,
    images: Images,
    texts: Texts,
    logit_scale: Scalar,
    weights: Weights,
) -> tuple[Scalar, tuple]:
    def local(axes, images, texts, logit_scale, weights):
        rows, captions = len(images), len(texts) // len(images)
        by_row, by_column, positives = _softmax_statistics(
            axes, tile_rows(rows, tile), twins, images, texts, logit_scale
        )
        positives = (positives / captions)[:, None]
        # [rows, 1] and [rows, captions]
        terms = [
            jnp.mean((maximum - positives) + jnp.log(total), axis=1)
            for maximum, total in (jax.tree.map(lambda x: x.reshape(rows, -1), (by_row, by_column)))
        ]
        terms = sum(terms) if weights is None else weights * sum(terms)
        loss = sum_over(jnp.sum(terms), axes) / (2 * rows * count_devices(axes))
        if weights is not None:  # the backward pass divides by the sums
            by_row = by_row[0], by_row[1] / weights
            by_column = by_column[0], by_column[1] / jnp.repeat(weights, captions)
        return loss, by_row, by_column

    split = PartitionSpec(axes)
    out_specs = (WHOLE, split, split)
    arguments = images, texts, logit_scale, weights
    loss, *statistics = on_devices(mesh, axes, local, "ssws", out_specs)(*arguments)
    return loss, (*arguments, *statistics)


def _softmax_backward(
    mesh: Mesh | None, axes: Axes, tile: int, twins: bool, residuals: tuple, gradient: Scalar
) -> tuple[Images, Texts, Scalar, None]:
    def local(axes, images, texts, logit_scale, weights, by_row, by_column, gradient):
        rows, captions = len(images), len(texts) // len(images)
        image_rows, text_rows = _positions(axes, images, texts)

        def visit(fixed, fixed_sums, moving, moving_sums):
            images, image_rows, weights, (row_max, row_sum) = fixed
            texts, text_rows, (column_max, column_sum) = moving
            d_images, d_scale = fixed_sums
            logits = jnp.exp(logit_scale) * dot("ne,me->nm", images, texts)
            if twins:
                logits = hide_twins(logits, image_rows, text_rows)
            of_positive = 1 / captions if weights is None else weights[:, None] / captions
            target = jnp.where(image_rows[:, None] == text_rows[None], of_positive, 0)
            rows = jnp.exp(logits - row_max[:, None]) * (1 / row_sum)[:, None]
            columns = jnp.exp(logits - column_max[None]) * (1 / (captions * column_sum))[None]
            d_logits = (rows - target) + (columns - target)
            rounded = d_logits.astype(images.dtype)
            d_images += dot("nm,me->ne", rounded, texts)
            d_texts = moving_sums + dot("nm,ne->me", rounded, images)
            return (d_images, d_scale + jnp.sum(d_logits * logits, axis=1)), d_texts

        fixed_sums = jnp.zeros(images.shape), jnp.zeros(rows)
        (d_images, d_scale), d_texts = sweep(
            axes,
            tile_rows(rows, tile),
            visit,
            (images, image_rows, weights, by_row),
            fixed_sums,
            (texts, text_rows, by_column),
            jnp.zeros(texts.shape),
        )
        per_logit = gradient / (2 * rows * count_devices(axes))
        factor = jnp.exp(logit_scale) * per_logit
        return (
            (factor * d_images).astype(images.dtype),
            (factor * d_texts).astype(texts.dtype),
            per_logit * sum_over(jnp.sum(d_scale), axes),
        )

    split = PartitionSpec(axes)
    gradients = on_devices(mesh, axes, local, "sswsssw", (split, split, WHOLE))(
        *residuals, gradient
    )
    return *gradients, None


softmax.defvjp(_softmax_forward, _softmax_backward)


# --- sigmoid ---


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def sigmoid(
    mesh: Mesh | None,
    axes: Axes,
    tile: int,
    images: Images,
    texts: Texts,
    logit_scale: Scalar,
    logit_bias: Scalar,
    weights: Weights,
) -> Scalar:
    """Computes `losses.sigmoid_loss` in tiles."""

    def local(axes, images, texts, logit_scale, logit_bias, weights):
        rows = len(images)
        image_rows, text_rows = _positions(axes, images, texts)

        def visit(fixed, fixed_sums, moving, moving_sums):
            (images, image_rows, weights), (texts, text_rows, of_texts) = fixed, moving
            positive = image_rows[:, None] == text_rows[None]
            products = dot("ne,me->nm", images, texts)
            of_pairs = pair_weights(weights, of_texts)
            terms, _, _ = sigmoid_terms(products, positive, logit_scale, logit_bias, of_pairs)
            return fixed_sums + jnp.sum(terms, axis=1), moving_sums

        fixed_sums, _ = sweep(
            axes,
            tile_rows(rows, tile),
            visit,
            (images, image_rows, weights),
            jnp.zeros(rows),
            (texts, text_rows, by_caption(weights, len(texts) // rows)),
            (),
        )
        return sum_over(jnp.sum(fixed_sums), axes) / (len(texts) * count_devices(axes))

    arguments = images, texts, logit_scale, logit_bias, weights
    return on_devices(mesh, axes, local, "sswws", WHOLE)(*arguments)


def _sigmoid_forward(
    mesh: Mesh | None,
    axes: Axes,
    tile: int,
    images: Images,
    texts: Texts,
    logit_scale: Scalar,
    logit_bias: Scalar,
    weights: Weights,
) -> tuple[Scalar, tuple[Images, Texts, Scalar, Scalar]]:
    def local(axes, images, texts, logit_scale, logit_bias, weights):
        rows = len(images)
        image_rows, text_rows = _positions(axes, images, texts)

        def visit(fixed, fixed_sums, moving, moving_sums):
            (images, image_rows, weights), (texts, text_rows, of_texts) = fixed, moving
            positive = image_rows[:, None] == text_rows[None]
            products = dot("ne,me->nm", images, texts)
            of_pairs = pair_weights(weights, of_texts)
            found = sigmoid_terms(products, positive, logit_scale, logit_bias, of_pairs)
            d_images, *sums = fixed_sums
            rounded = found[1].astype(images.dtype)
            d_images += dot("nm,me->ne", rounded, texts)
            sums = [total + jnp.sum(x, axis=1) for total, x in zip(sums, found)]
            return (d_images, *sums), moving_sums + dot("nm,ne->me", rounded, images)

        zeros = jnp.zeros(rows)
        (d_images, *sums), d_texts = sweep(
            axes,
            tile_rows(rows, tile),
            visit,
            (images, image_rows, weights),
            (jnp.zeros(images.shape), zeros, zeros, zeros),
            (texts, text_rows, by_caption(weights, len(texts) // rows)),
            jnp.zeros(texts.shape),
        )
        count = len(texts) * count_devices(axes)
        loss, d_bias, d_scale = (sum_over(jnp.sum(x), axes) / count for x in sums)
        factor = jnp.exp(logit_scale) / count
        d_embeds = (factor * d_images).astype(images.dtype), (factor * d_texts).astype(texts.dtype)
        return loss, (*d_embeds, d_scale, d_bias)

    split = PartitionSpec(axes)
    out_specs = (WHOLE, (split, split, WHOLE, WHOLE))
    arguments = images, texts, logit_scale, logit_bias, weights
    return on_devices(mesh, axes, local, "sswws", out_specs)(*arguments)


def _sigmoid_backward(
    mesh: Mesh | None,
    axes: Axes,
    tile: int,
    residuals: tuple[Float[Array, "..."], ...],
    gradient: Scalar,
) -> tuple[Float[Array, "..."] | None, ...]:
    del mesh, axes, tile
    return *scale_gradients(residuals, gradient), None


sigmoid.defvjp(_sigmoid_forward, _sigmoid_backward)
