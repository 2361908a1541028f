"""Losses for which each device gathers all texts and holds its rows of the logits."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from clip_jax.losses.products import dot
from clip_jax.sharding import AXES, EVERY_AXIS

_WHOLE = PartitionSpec()


def plain_softmax(images: jax.Array, texts: jax.Array, logit_scale: jax.Array) -> jax.Array:
    """The reference, on one device."""
    logits = jnp.exp(logit_scale) * dot("ie,te->it", images, texts)
    rows, columns = jax.nn.logsumexp(logits, axis=1), jax.nn.logsumexp(logits, axis=0)
    return jnp.mean((rows + columns) / 2 - jnp.diagonal(logits))


def plain_sigmoid(
    images: jax.Array, texts: jax.Array, logit_scale: jax.Array, logit_bias: jax.Array
) -> jax.Array:
    """The reference, on one device."""
    logits = jnp.exp(logit_scale) * dot("ie,te->it", images, texts) + logit_bias
    signs = 2 * jnp.eye(len(images)) - 1
    return -jnp.sum(jax.nn.log_sigmoid(signs * logits)) / len(images)


# --- softmax: below, n = B / devices rows are local, and "all" marks what spans the batch. ---


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def softmax(mesh: Mesh, images, texts, logit_scale):
    """`losses.softmax_loss` over a mesh."""
    return _softmax_forward(mesh, images, texts, logit_scale)[0]


def _softmax_forward(mesh: Mesh, images, texts, logit_scale):
    def local(images, texts, logit_scale):
        all_texts = jax.lax.all_gather(texts, AXES, tiled=True)
        logits = jnp.exp(logit_scale) * dot("ne,be->nb", images, all_texts)
        # A softmax is kept as maximum and sum: as one log-sum-exp near 100, what distinguishes a
        # confident row would round away.
        row_max = logits.max(axis=1)
        row_sum = jnp.exp(logits - row_max[:, None]).sum(axis=1)
        # Columns run over all devices: each brings its maxima and sums, not its logits.
        column_max = jax.lax.pmax(logits.max(axis=0), AXES)
        column_sum = jax.lax.psum(jnp.exp(logits - column_max[None]).sum(axis=0), AXES)
        # Positives out of the logits themselves: rounded alike, they cancel exactly.
        positives = jnp.sum(jnp.where(_is_positive(logits), logits, 0), axis=1)
        by_row = (row_max - positives) + jnp.log(row_sum)
        by_column = (_own(column_max, logits) - positives) + jnp.log(_own(column_sum, logits))
        loss = jax.lax.psum(jnp.sum(by_row + by_column), AXES) / (2 * logits.shape[1])
        return loss, logits, (row_max, row_sum), (column_max, column_sum)

    shard = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(EVERY_AXIS, EVERY_AXIS, _WHOLE),
        out_specs=(_WHOLE, EVERY_AXIS, EVERY_AXIS, _WHOLE),
    )
    loss, *statistics = shard(images, texts, logit_scale)
    return loss, (images, texts, logit_scale, *statistics)


def _softmax_backward(mesh: Mesh, residuals, gradient):
    images, texts, logit_scale, logits, rows, columns = residuals

    def local(images, texts, logit_scale, logits, rows, columns, gradient):
        (row_max, row_sum), (column_max, column_sum) = rows, columns
        by_row = jnp.exp(logits - row_max[:, None]) * (1 / row_sum)[:, None]
        by_column = jnp.exp(logits - column_max[None]) * (1 / column_sum)[None]
        target = _is_positive(logits).astype(jnp.float32)
        d_logits = (by_row - target) + (by_column - target)
        d_logits *= gradient / (2 * logits.shape[1])

        weights = (jnp.exp(logit_scale) * d_logits).astype(images.dtype)
        all_texts = jax.lax.all_gather(texts, AXES, tiled=True)
        d_images = dot("nb,be->ne", weights, all_texts)
        d_texts = jax.lax.psum_scatter(dot("nb,ne->be", weights, images), AXES, tiled=True)
        d_scale = jax.lax.psum(jnp.sum(d_logits * logits), AXES)
        return d_images.astype(images.dtype), d_texts.astype(texts.dtype), d_scale

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(EVERY_AXIS, EVERY_AXIS, _WHOLE, EVERY_AXIS, EVERY_AXIS, _WHOLE, _WHOLE),
        out_specs=(EVERY_AXIS, EVERY_AXIS, _WHOLE),
    )(images, texts, logit_scale, logits, rows, columns, gradient)


softmax.defvjp(_softmax_forward, _softmax_backward)


def _is_positive(logits: jax.Array) -> jax.Array:
    """Mask of the pairs that belong together, in this device's rows [n, B]."""
    own = jax.lax.axis_index(AXES) * logits.shape[0] + jnp.arange(logits.shape[0])
    return own[:, None] == jnp.arange(logits.shape[1])[None]


def _own(all_values: jax.Array, logits: jax.Array) -> jax.Array:
    """The part [n] of [B] values that belongs to this device's rows."""
    n = logits.shape[0]
    return jax.lax.dynamic_slice_in_dim(all_values, jax.lax.axis_index(AXES) * n, n)


# --- sigmoid ---


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def sigmoid(mesh: Mesh, images, texts, logit_scale, logit_bias):
    """`losses.sigmoid_loss` over a mesh."""

    def local(images, texts, logit_scale, logit_bias):
        all_texts = jax.lax.all_gather(texts, AXES, tiled=True)
        products = dot("ne,be->nb", images, all_texts)
        terms, _, _ = sigmoid_terms(products, _is_positive(products), logit_scale, logit_bias)
        return jax.lax.psum(jnp.sum(terms), AXES) / products.shape[1]

    return _shard_sigmoid(local, mesh, _WHOLE)(images, texts, logit_scale, logit_bias)


def _sigmoid_forward(mesh: Mesh, images, texts, logit_scale, logit_bias):
    def local(images, texts, logit_scale, logit_bias):
        all_texts = jax.lax.all_gather(texts, AXES, tiled=True)
        products = dot("ne,be->nb", images, all_texts)
        positive = _is_positive(products)
        terms, d_logits, d_scale = sigmoid_terms(products, positive, logit_scale, logit_bias)
        batch = products.shape[1]
        weights = (jnp.exp(logit_scale) / batch * d_logits).astype(images.dtype)
        d_images = dot("nb,be->ne", weights, all_texts)
        d_texts = jax.lax.psum_scatter(dot("nb,ne->be", weights, images), AXES, tiled=True)
        loss, d_scale, d_bias = (
            jax.lax.psum(jnp.sum(x), AXES) / batch for x in (terms, d_scale, d_logits)
        )
        return loss, (d_images.astype(images.dtype), d_texts.astype(texts.dtype), d_scale, d_bias)

    out_specs = (_WHOLE, (EVERY_AXIS, EVERY_AXIS, _WHOLE, _WHOLE))
    return _shard_sigmoid(local, mesh, out_specs)(images, texts, logit_scale, logit_bias)


def _shard_sigmoid(local, mesh: Mesh, out_specs):
    in_specs = (EVERY_AXIS, EVERY_AXIS, _WHOLE, _WHOLE)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def sigmoid_terms(products, positive, logit_scale, logit_bias):
    """Of each pair: its loss, and the derivatives of that by its logit and by logit_scale."""
    scaled = jnp.exp(logit_scale) * products
    wrong = jnp.where(positive, -1.0, 1.0)  # the sign that makes a high logit a mistake
    logits = wrong * (scaled + logit_bias)
    d_logits = wrong * jax.nn.sigmoid(logits)
    return jax.nn.softplus(logits), d_logits, d_logits * scaled


def scale_gradients(gradients, gradient):
    """The backward pass of a loss whose forward pass left its gradients behind."""
    return tuple((gradient * g).astype(g.dtype) for g in gradients)


sigmoid.defvjp(_sigmoid_forward, lambda mesh, residuals, g: scale_gradients(residuals, g))
