"""Losses over the global batch, whatever the mesh.

Of the contrastive ones, embeddings are global arrays [B, e], L2-normalised, split over the batch on
the mesh; row i of the images belongs to row i of the texts. Statistics and sums are float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from clip_jax.errors import UserError
from clip_jax.losses import gathered, ring

METHODS = ("all_gather", "ring")


def softmax_loss(
    image_embed: jax.Array,
    text_embed: jax.Array,
    logit_scale: jax.Array,
    *,
    mesh: Mesh | None = None,
    method: str = "all_gather",
    tile: int = 1024,
) -> jax.Array:
    """Symmetric cross-entropy over all B x B similarities (paper, figure 3).

    Args:
      image_embed: [B, e], float32 or bfloat16.
      text_embed: [B, e], like image_embed.
      logit_scale: float32 [], natural logarithm of the multiplier of the similarities.
      mesh: devices that the batch is split over, along all axes; None: one device.
      method: "all_gather": each device gathers all texts and holds its rows of the logits; both
        directions are read off the same logits. Without a mesh, the plain reference. "ring": the
        texts travel from device to device, and no more than a tile of logits exists at a time;
        for 4/3 of the operations.
      tile: of the ring: rows and columns of a tile, at most.

    Returns:
      float32 [], the mean of the two directions, in nats.

    Raises:
      UserError: unknown method, or a batch that the mesh does not divide.
    """
    _check(image_embed, text_embed, mesh, method)
    if method == "ring":
        return ring.softmax(mesh, tile, image_embed, text_embed, logit_scale)
    if mesh is None:
        return gathered.plain_softmax(image_embed, text_embed, logit_scale)
    return gathered.softmax(mesh, image_embed, text_embed, logit_scale)


def sigmoid_loss(
    image_embed: jax.Array,
    text_embed: jax.Array,
    logit_scale: jax.Array,
    logit_bias: jax.Array,
    *,
    mesh: Mesh | None = None,
    method: str = "all_gather",
    tile: int = 1024,
) -> jax.Array:
    """Every pair a yes-no question of its own (SigLIP, Zhai et al. 2023, arXiv:2303.15343).

    Args:
      image_embed, text_embed, logit_scale, mesh, method, tile: as for `softmax_loss`. Neither form
        keeps logits for the backward pass: gradients need no statistics of other tiles, so the
        forward pass leaves them behind, at the operations of the plain form.
      logit_bias: float32 [], added to the scaled similarities.

    Returns:
      float32 []: the sum over all pairs divided by B, in nats.

    Raises:
      UserError: as for `softmax_loss`.
    """
    _check(image_embed, text_embed, mesh, method)
    pairs = image_embed, text_embed, logit_scale, logit_bias
    if method == "ring":
        return ring.sigmoid(mesh, tile, *pairs)
    if mesh is None:
        return gathered.plain_sigmoid(*pairs)
    return gathered.sigmoid(mesh, *pairs)


def prediction_loss(nats: jax.Array, predictions: jax.Array) -> jax.Array:
    """The mean over all predictions of the batch, for models that predict captions.

    Args:
      nats: float32 [B], what was not foreseen of each caption.
      predictions: float32 [B], into how many predictions that divides: tokens, or 1.

    Returns:
      float32 [], in nats.
    """
    return jnp.sum(nats) / jnp.sum(predictions)


# By config.loss.name. Each takes what the model returns, and mesh, method and tile.
LOSSES: dict[str, Callable[..., jax.Array]] = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


def _check(images: jax.Array, texts: jax.Array, mesh: Mesh | None, method: str) -> None:
    if images.shape != texts.shape:
        raise ValueError(f"Pairs differ in shape: {images.shape} and {texts.shape}.")
    if method not in METHODS:
        raise UserError(f"Unknown loss.method {method!r}: choose one of {', '.join(METHODS)}.")
    if mesh is not None and images.shape[0] % mesh.size:
        raise UserError(
            f"A batch of {images.shape[0]} cannot be split evenly over {mesh.size} devices: "
            "make batch_size a multiple of the devices."
        )
