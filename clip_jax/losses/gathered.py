"""Losses for which each device gathers all texts and holds its rows of the logits."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

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


def plain_softmax(
    twins: bool, images: Images, texts: Texts, logit_scale: Scalar, weights: Weights
) -> Scalar:
    """Computes the reference, on one device."""
    logits = jnp.exp(logit_scale) * dot("ie,te->it", images, texts)
    if twins:
        logits = hide_twins(logits, jnp.arange(len(images)), jnp.arange(len(texts)))
    rows, columns = jax.nn.logsumexp(logits, axis=1), jax.nn.logsumexp(logits, axis=0)
    # The captions of an image are one dimension: [batch, batch, c] -> [c, batch].
    positives = jnp.diagonal(logits.reshape(len(images), len(images), -1))
    terms = (rows + columns.reshape(len(images), -1).T) / 2 - positives
    return jnp.mean(terms if weights is None else weights * terms)


def plain_sigmoid(
    images: Images, texts: Texts, logit_scale: Scalar, logit_bias: Scalar, weights: Weights
) -> Scalar:
    """Computes the reference, on one device."""
    logits = jnp.exp(logit_scale) * dot("ie,te->it", images, texts) + logit_bias
    captions = len(texts) // len(images)
    signs = jnp.repeat(2 * jnp.eye(len(images)) - 1, captions, axis=1)
    terms, of_pairs = (
        jax.nn.log_sigmoid(signs * logits),
        pair_weights(weights, by_caption(weights, captions)),
    )
    return -jnp.sum(terms if of_pairs is None else of_pairs * terms) / len(texts)


# --- softmax: below, n = B / devices rows are local, and "all" marks the texts of the batch. ---


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def softmax(
    mesh: Mesh,
    axes: Axes,
    twins: bool,
    images: Images,
    texts: Texts,
    logit_scale: Scalar,
    weights: Weights,
) -> Scalar:
    """Computes `losses.softmax_loss` over a mesh."""
    return _softmax_forward(mesh, axes, twins, images, texts, logit_scale, weights)[0]


def _softmax_forward(
    mesh: Mesh,
    axes: Axes,
    twins: bool,
    images: Images,
    texts: Texts,
    logit_scale: Scalar,
    weights: Weights,
) -> tuple[Scalar, tuple]:
    def local(images, texts, logit_scale, weights):
        all_texts = jax.lax.all_gather(texts, axes, tiled=True)
        logits = jnp.exp(logit_scale) * dot("ne,be->nb", images, all_texts)
        if twins:
            logits = hide_twins(logits, _places(logits, axes), jnp.arange(logits.shape[1]))
        # A softmax is kept as maximum and sum: as one log-sum-exp near 100, what distinguishes a
        # confident row would round away.
        row_max = logits.max(axis=1)
        row_sum = jnp.exp(logits - row_max[:, None]).sum(axis=1)
        # Columns run over all devices: each brings its maxima and sums, not its logits.
        column_max = jax.lax.pmax(logits.max(axis=0), axes)
        column_sum = jax.lax.psum(jnp.exp(logits - column_max[None]).sum(axis=0), axes)
        # Positives out of the logits themselves: rounded alike, they cancel exactly.
        captions = _captions(logits, axes)
        positives = jnp.sum(jnp.where(_is_positive(logits, axes), logits, 0), axis=1) / captions
        by_row = (row_max - positives) + jnp.log(row_sum)
        own_max, own_sum = (_own(x, logits, axes) for x in (column_max, column_sum))
        by_column = jnp.mean((own_max - positives[:, None]) + jnp.log(own_sum), axis=1)
        terms = by_row + by_column
        terms = terms if weights is None else weights * terms
        loss = jax.lax.psum(jnp.sum(terms), axes) / (2 * (logits.shape[1] // captions))
        return loss, logits, (row_max, row_sum), (column_max, column_sum)

    split = PartitionSpec(axes)
    shard = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split, split, WHOLE, split),
        out_specs=(WHOLE, split, split, WHOLE),
    )
    loss, *statistics = shard(images, texts, logit_scale, weights)
    return loss, (images, texts, logit_scale, weights, *statistics)


def _softmax_backward(
    mesh: Mesh, axes: Axes, twins: bool, residuals: tuple, gradient: Scalar
) -> tuple[Images, Texts, Scalar, None]:
    del twins  # they are hidden in the logits
    images, texts, logit_scale, weights, logits, rows, columns = residuals

    def local(images, texts, logit_scale, weights, logits, rows, columns, gradient):
        (row_max, row_sum), (column_max, column_sum) = rows, columns
        captions = _captions(logits, axes)
        of_row, of_column, of_positive = 1 / row_sum, 1 / (captions * column_sum), 1 / captions
        if weights is not None:
            all_weights = jax.lax.all_gather(weights, axes, tiled=True)
            of_row, of_positive = weights * of_row, (weights * of_positive)[:, None]
            of_column *= by_caption(all_weights, captions)
        by_row = jnp.exp(logits - row_max[:, None]) * of_row[:, None]
        by_column = jnp.exp(logits - column_max[None]) * of_column[None]
        target = jnp.where(_is_positive(logits, axes), of_positive, 0)
        d_logits = (by_row - target) + (by_column - target)
        d_logits *= gradient / (2 * (logits.shape[1] // captions))

        scaled = (jnp.exp(logit_scale) * d_logits).astype(images.dtype)
        all_texts = jax.lax.all_gather(texts, axes, tiled=True)
        d_images = dot("nb,be->ne", scaled, all_texts)
        d_texts = jax.lax.psum_scatter(dot("nb,ne->be", scaled, images), axes, tiled=True)
        d_scale = jax.lax.psum(jnp.sum(d_logits * logits), axes)
        return d_images.astype(images.dtype), d_texts.astype(texts.dtype), d_scale

    split = PartitionSpec(axes)
    gradients = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split, split, WHOLE, split, split, split, WHOLE, WHOLE),
        out_specs=(split, split, WHOLE),
    )(images, texts, logit_scale, weights, logits, rows, columns, gradient)
    return *gradients, None


softmax.defvjp(_softmax_forward, _softmax_backward)


def _is_positive(logits: Float[Array, "n all"], axes: Axes) -> Bool[Array, "n all"]:
    """Masks the pairs that belong together, in this device's rows."""
    own = _places(logits, axes)
    return own[:, None] == (jnp.arange(logits.shape[1]) // _captions(logits, axes))[None]


def _places(logits: Float[Array, "n all"], axes: Axes) -> Int[Array, " n"]:
    """Returns the places of this device's rows in the batch."""
    return jax.lax.axis_index(axes) * logits.shape[0] + jnp.arange(logits.shape[0])


def _own(
    all_values: Float[Array, " all"], logits: Float[Array, "n all"], axes: Axes
) -> Float[Array, "n captions"]:
    """Cuts out the values of the captions of this device's rows."""
    n, captions = logits.shape[0], _captions(logits, axes)
    own = jax.lax.axis_index(axes) * n * captions
    return jax.lax.dynamic_slice_in_dim(all_values, own, n * captions).reshape(n, captions)


def _captions(logits: Float[Array, "n all"], axes: Axes) -> int:
    """Counts the captions of each image."""
    return logits.shape[1] // (logits.shape[0] * jax.lax.axis_size(axes))


# --- sigmoid ---


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sigmoid(
    mesh: Mesh,
    axes: Axes,
    images: Images,
    texts: Texts,
    logit_scale: Scalar,
    logit_bias: Scalar,
    weights: Weights,
) -> Scalar:
    """Computes `losses.sigmoid_loss` over a mesh."""

    def local(images, texts, logit_scale, logit_bias, weights):
        all_texts = jax.lax.all_gather(texts, axes, tiled=True)
        products = dot("ne,be->nb", images, all_texts)
        positive = _is_positive(products, axes)
        of_pairs = _pair_weights(weights, products, axes)
        terms, _, _ = sigmoid_terms(products, positive, logit_scale, logit_bias, of_pairs)
        return jax.lax.psum(jnp.sum(terms), axes) / products.shape[1]

    shard = _shard_sigmoid(local, mesh, axes, WHOLE)
    return shard(images, texts, logit_scale, logit_bias, weights)


def _sigmoid_forward(
    mesh: Mesh,
    axes: Axes,
    images: Images,
    texts: Texts,
    logit_scale: Scalar,
    logit_bias: Scalar,
    weights: Weights,
) -> tuple[Scalar, tuple[Images, Texts, Scalar, Scalar]]:
    def local(images, texts, logit_scale, logit_bias, weights):
        all_texts = jax.lax.all_gather(texts, axes, tiled=True)
        products = dot("ne,be->nb", images, all_texts)
        positive = _is_positive(products, axes)
        of_pairs, count = _pair_weights(weights, products, axes), products.shape[1]
        terms, d_logits, d_scale = sigmoid_terms(
            products, positive, logit_scale, logit_bias, of_pairs
        )
        scaled = (jnp.exp(logit_scale) / count * d_logits).astype(images.dtype)
        d_images = dot("nb,be->ne", scaled, all_texts)
        d_texts = jax.lax.psum_scatter(dot("nb,ne->be", scaled, images), axes, tiled=True)
        loss, d_scale, d_bias = (
            jax.lax.psum(jnp.sum(x), axes) / count for x in (terms, d_scale, d_logits)
        )
        return loss, (d_images.astype(images.dtype), d_texts.astype(texts.dtype), d_scale, d_bias)

    split = PartitionSpec(axes)
    out_specs = (WHOLE, (split, split, WHOLE, WHOLE))
    shard = _shard_sigmoid(local, mesh, axes, out_specs)
    return shard(images, texts, logit_scale, logit_bias, weights)


def _pair_weights(
    weights: Weights, products: Float[Array, "n all"], axes: Axes
) -> Float[Array, "n all"] | None:
    """Returns the weights of the pairs in this device's rows."""
    if weights is None:
        return None
    all_weights = jax.lax.all_gather(weights, axes, tiled=True)
    return pair_weights(weights, by_caption(all_weights, _captions(products, axes)))


def _shard_sigmoid(local: Callable, mesh: Mesh, axes: Axes, out_specs: Any) -> Callable:
    split = PartitionSpec(axes)
    in_specs = (split, split, WHOLE, WHOLE, split)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def _sigmoid_backward(
    mesh: Mesh, axes: Axes, residuals: tuple[Float[Array, "..."], ...], gradient: Scalar
) -> tuple[Float[Array, "..."] | None, ...]:
    del mesh, axes
    return *scale_gradients(residuals, gradient), None


sigmoid.defvjp(_sigmoid_forward, _sigmoid_backward)
