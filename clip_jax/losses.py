"""Contrastive losses over the global batch, whatever the mesh.

Embeddings are global arrays [B, e], L2-normalised, split over the batch on the mesh; row i of the
images belongs to row i of the texts. Statistics and sums are float32.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from clip_jax.errors import UserError
from clip_jax.sharding import AXES, BATCH

_WHOLE = PartitionSpec()


def softmax_loss(
    image_embed: jax.Array,
    text_embed: jax.Array,
    logit_scale: jax.Array,
    *,
    mesh: Mesh | None = None,
    method: str = "all_gather",
) -> jax.Array:
    """Symmetric cross-entropy over all B x B similarities (paper, figure 3).

    Args:
      image_embed: [B, e], float32 or bfloat16.
      text_embed: [B, e], like image_embed.
      logit_scale: float32 [], natural logarithm of the multiplier of the similarities.
      mesh: devices that the batch is split over; None: the plain form, for one device.
      method: the sharded form. "all_gather": each device gathers all texts and holds its rows of
        the logits; both directions are read off the same logits.

    Returns:
      float32 [], the mean of the two directions, in nats.

    Raises:
      UserError: unknown method, or a batch that the mesh does not divide.
    """
    if image_embed.shape != text_embed.shape:
        raise ValueError(f"Pairs differ in shape: {image_embed.shape} and {text_embed.shape}.")
    if method not in METHODS:
        raise UserError(f"Unknown loss.method {method!r}: choose one of {', '.join(METHODS)}.")
    if mesh is None:
        return _plain(image_embed, text_embed, logit_scale)
    if image_embed.shape[0] % mesh.size:
        raise UserError(
            f"A batch of {image_embed.shape[0]} cannot be split evenly over {mesh.size} devices: "
            "make batch_size a multiple of the devices."
        )
    return METHODS[method](mesh, image_embed, text_embed, logit_scale)


def _plain(images: jax.Array, texts: jax.Array, logit_scale: jax.Array) -> jax.Array:
    logits = jnp.exp(logit_scale) * _dot("ie,te->it", images, texts)
    rows, columns = jax.nn.logsumexp(logits, axis=1), jax.nn.logsumexp(logits, axis=0)
    return jnp.mean((rows + columns) / 2 - jnp.diagonal(logits))


def _dot(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum with float32 sums; true float32 products where the inputs are float32."""
    return jnp.einsum(
        subscripts,
        a,
        b,
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
    )


# --- all_gather: below, n = B / devices rows are local, and "all" marks what spans the batch. ---


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _all_gather(mesh: Mesh, images, texts, logit_scale):
    return _all_gather_forward(mesh, images, texts, logit_scale)[0]


def _all_gather_forward(mesh: Mesh, images, texts, logit_scale):
    def local(images, texts, logit_scale):
        all_texts = jax.lax.all_gather(texts, AXES, tiled=True)
        logits = jnp.exp(logit_scale) * _dot("ne,be->nb", images, all_texts)
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
        in_specs=(BATCH, BATCH, _WHOLE),
        out_specs=(_WHOLE, BATCH, BATCH, _WHOLE),
    )
    loss, *statistics = shard(images, texts, logit_scale)
    return loss, (images, texts, logit_scale, *statistics)


def _all_gather_backward(mesh: Mesh, residuals, gradient):
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
        d_images = _dot("nb,be->ne", weights, all_texts)
        d_texts = jax.lax.psum_scatter(_dot("nb,ne->be", weights, images), AXES, tiled=True)
        d_scale = jax.lax.psum(jnp.sum(d_logits * logits), AXES)
        return d_images.astype(images.dtype), d_texts.astype(texts.dtype), d_scale

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(BATCH, BATCH, _WHOLE, BATCH, BATCH, _WHOLE, _WHOLE),
        out_specs=(BATCH, BATCH, _WHOLE),
    )(images, texts, logit_scale, logits, rows, columns, gradient)


def _is_positive(logits: jax.Array) -> jax.Array:
    """Mask of the pairs that belong together, in this device's rows [n, B]."""
    own = jax.lax.axis_index(AXES) * logits.shape[0] + jnp.arange(logits.shape[0])
    return own[:, None] == jnp.arange(logits.shape[1])[None]


def _own(all_values: jax.Array, logits: jax.Array) -> jax.Array:
    """The part [n] of [B] values that belongs to this device's rows."""
    n = logits.shape[0]
    return jax.lax.dynamic_slice_in_dim(all_values, jax.lax.axis_index(AXES) * n, n)


_all_gather.defvjp(_all_gather_forward, _all_gather_backward)

METHODS = {"all_gather": _all_gather}
