"""Losses over the global batch, on any mesh.

The contrastive ones take global arrays of L2-normalised embeddings, split over the batch on the
mesh; row i of the images belongs to row i of the texts. An image may have several captions.
Statistics and sums are float32.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from clip_jax.choices import LOSS_METHODS
from clip_jax.errors import UserError
from clip_jax.losses import distillation, gathered, ring

# Embeddings of images and texts by a teacher, L2-normalised, and its logit_scale.
Teacher = tuple[Float[Array, "batch _"], Float[Array, "batch *captions _"], Float[Array, ""]]


def softmax_loss(
    image_embed: Float[Array, "batch embed"],
    text_embed: Float[Array, "batch *captions embed"],
    logit_scale: Float[Array, ""],
    *,
    mesh: Mesh | None = None,
    batch_axes: str | Sequence[str] | None = None,
    method: str = "all_gather",
    tile: int = 1024,
    weights: Float[Array, " batch"] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """Computes the symmetric cross-entropy over all B x B similarities (paper, figure 3).

    With c captions an image, each image is matched with all B x c captions, and its target spreads
    evenly over its own (UniCL, Yang et al. 2022, arXiv:2204.03610; a form that SupCon and StableRep
    have for images, arXiv:2004.11362 and 2306.00984). So its captions compete with each other, and
    the loss is at least (log c) / 2. Each caption is matched with the B images.

    Args:
      image_embed: float32 or bfloat16, L2-normalised.
      text_embed: like image_embed; with several captions an image [B, c, embed].
      logit_scale: float32, natural logarithm of the multiplier of the similarities.
      mesh: devices that the batch is split over, with any axis names; None: one device. On a mesh
        with explicit axis types, take gradients under `jax.jit` or within `jax.set_mesh(mesh)`.
      batch_axes: mesh axes that split the batch, outermost first; the embeddings are the same along
        the others. None: all axes.
      method: "all_gather": each device gathers all texts and holds its rows of the logits; both
        directions are read off the same logits. Without a mesh: the full matrix of logits on one
        device. "ring": the texts travel from device to device, and no more than a tile of logits
        exists at a time, for 4/3 of the operations.
      tile: rows and columns of a tile of the ring, at most.
      weights: weight of each image and its captions, not negative; None: equal ones. The terms of
        each direction are averaged by them, and they are divided by their sum. An example without
        weight is still a negative of the others. If all weights are zero, so are loss and gradient.
      label_smoothing: fraction of each target that is spread over all texts, or all images (Szegedy
        et al. 2015, arXiv:1512.00567).

    Returns:
      The mean of the two directions, float32, in nats.

    Raises:
      UserError: unknown method or axis, or a batch that the mesh does not divide.
    """
    mesh, axes = _batch_mesh(mesh, batch_axes)
    _check(image_embed, text_embed, mesh, axes, method)
    weights = _normalised(weights)
    images, texts, logit_scale, weights = _place(
        mesh, axes, image_embed, text_embed, logit_scale, weights
    )
    pairs = images, _rows(texts), logit_scale, weights
    loss = _softmax(mesh, axes, method, tile, False, *pairs)
    if label_smoothing:
        loss += label_smoothing * _margin(images, texts, logit_scale, weights)
    return loss


def views_loss(
    views: Float[Array, "batch 2 embed"],
    logit_scale: Float[Array, ""],
    *,
    mesh: Mesh | None = None,
    batch_axes: str | Sequence[str] | None = None,
    method: str = "all_gather",
    tile: int = 1024,
    weights: Float[Array, " batch"] | None = None,
) -> Float[Array, ""]:
    """Computes SimCLR's loss, NT-Xent (Chen et al. 2020, arXiv:2002.05709).

    Each view is to be told from all others of the batch but itself by the other view of its image.

    Args:
      views: embeddings of two views of each image, L2-normalised.
      logit_scale, mesh, batch_axes, method, tile, weights: see `softmax_loss`.

    Returns:
      The mean cross-entropy over all views, float32, in nats.

    Raises:
      UserError: see `softmax_loss`.
    """
    mesh, axes = _batch_mesh(mesh, batch_axes)
    _check(views[:, 0], views[:, 1], mesh, axes, method)
    weights = _normalised(weights)
    if weights is not None:
        weights = jnp.repeat(weights, 2)
    # Row 2i is the first view of image i and column 2i the second: so the positives lie on the
    # diagonal, and the columns are the rows once more, in another order.
    rows, columns = (x.reshape(-1, x.shape[-1]) for x in (views, views[:, ::-1]))
    pairs = _place(mesh, axes, rows, columns, logit_scale, weights)
    return _softmax(mesh, axes, method, tile, True, *pairs)


def sigmoid_loss(
    image_embed: Float[Array, "batch embed"],
    text_embed: Float[Array, "batch *captions embed"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""],
    *,
    mesh: Mesh | None = None,
    batch_axes: str | Sequence[str] | None = None,
    method: str = "all_gather",
    tile: int = 1024,
    weights: Float[Array, " batch"] | None = None,
) -> Float[Array, ""]:
    """Computes SigLIP's loss, a binary classification of every pair (Zhai et al. 2023).

    arXiv:2303.15343. No logits are kept for the backward pass: the gradient of a pair depends on
    its own logit alone, so the forward pass computes the gradients too and keeps only them.

    Args:
      image_embed, text_embed, logit_scale, mesh, batch_axes, method, tile: see `softmax_loss`. Both
        methods take the same number of operations.
      logit_bias: float32, added to the scaled similarities.
      weights: as in `softmax_loss`; that of a pair is the mean of its image's and its text's.

    Returns:
      The sum over all pairs of an image and a caption, divided by the number of captions; float32,
      in nats.

    Raises:
      UserError: see `softmax_loss`.
    """
    mesh, axes = _batch_mesh(mesh, batch_axes)
    _check(image_embed, text_embed, mesh, axes, method)
    pairs = _place(
        mesh, axes, image_embed, _rows(text_embed), logit_scale, logit_bias, _normalised(weights)
    )
    if method == "ring":
        return ring.sigmoid(mesh, axes, tile, *pairs)
    if mesh is None:
        return gathered.plain_sigmoid(*pairs)
    return gathered.sigmoid(mesh, axes, *pairs)


def prediction_loss(
    nats: Float[Array, " batch"], predictions: Float[Array, " batch"]
) -> Float[Array, ""]:
    """Computes the mean over all predictions of the batch, for models that predict captions.

    Args:
      nats: float32, negative log-likelihood of each caption.
      predictions: float32, number of predictions that each of them sums over: tokens, or 1.

    Returns:
      float32, in nats; 0 where there are none.
    """
    return jnp.sum(nats) / jnp.maximum(jnp.sum(predictions), jnp.finfo(jnp.float32).tiny)


def distillation_loss(
    image_embed: Float[Array, "batch embed"],
    text_embed: Float[Array, "batch *captions embed"],
    logit_scale: Float[Array, ""],
    teachers: Sequence[Teacher],
    *,
    mesh: Mesh | None = None,
    batch_axes: str | Sequence[str] | None = None,
    method: str = "all_gather",
    tile: int = 1024,
    weights: Float[Array, " batch"] | None = None,
) -> Float[Array, ""]:
    """Computes the divergence of the student's similarities from those of its teachers.

    MobileCLIP's distillation loss (Vasu et al. 2024, arXiv:2311.17049), TinyCLIP's affinity
    mimicking with cross-entropies (Wu et al. 2023, arXiv:2309.12314): for each image, the
    Kullback-Leibler divergence of its distribution over all texts from the teacher's, and for each
    text that over all images. With several captions an image, all of them are texts.

    Args:
      image_embed, text_embed, logit_scale: the student's, as for `softmax_loss`.
      teachers: embeddings of the same images and texts by each teacher, of any width, and its own
        logit_scale. They get no gradient.
      mesh, batch_axes, method, tile, weights: see `softmax_loss`.

    Returns:
      The mean over both directions and all teachers, float32, in nats.

    Raises:
      UserError: see `softmax_loss`.
      ValueError: there is no teacher, or one has embedded other pairs.
    """
    mesh, axes = _batch_mesh(mesh, batch_axes)
    _check(image_embed, text_embed, mesh, axes, method)
    for images, texts, _ in teachers:
        _check(images, texts, mesh, axes, method)
    if not teachers or any(x.shape[:-1] != text_embed.shape[:-1] for _, x, _ in teachers):
        raise ValueError("There is no teacher, or it has embedded other pairs than the student.")
    images, texts, scales = (
        tuple(map(jax.lax.stop_gradient, parts)) for parts in zip(*teachers, strict=True)
    )
    pairs = _place(
        mesh,
        axes,
        image_embed,
        _rows(text_embed),
        logit_scale,
        (images, tuple(map(_rows, texts)), scales),
        _normalised(weights),
    )
    return distillation.distillation(mesh, axes, tile if method == "ring" else 0, *pairs)


# By config.loss.name, one of `choices.LOSS_NAMES`. Each takes what the model returns, and the
# keyword arguments of `softmax_loss`.
LOSSES: dict[str, Callable[..., jax.Array]] = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


def _softmax(
    mesh: Mesh | None, axes: tuple[str, ...], method: str, tile: int, twins: bool, *pairs: Any
) -> Float[Array, ""]:
    if method == "ring":
        return ring.softmax(mesh, axes, tile, twins, *pairs)
    if mesh is None:
        return gathered.plain_softmax(twins, *pairs)
    return gathered.softmax(mesh, axes, twins, *pairs)


def _batch_mesh(
    mesh: Mesh | None, batch_axes: str | Sequence[str] | None
) -> tuple[Mesh | None, tuple[str, ...]]:
    """Returns the mesh and its axes that split the batch; no mesh where there are none."""
    if mesh is None:
        return None, ()
    if batch_axes is None:
        axes = tuple(mesh.axis_names)
    else:
        axes = (batch_axes,) if isinstance(batch_axes, str) else tuple(batch_axes)
    if unknown := [axis for axis in axes if axis not in mesh.axis_names]:
        raise UserError(
            f"The batch cannot be split over the mesh axes {', '.join(map(repr, unknown))}: this "
            f"mesh has {', '.join(map(repr, mesh.axis_names))}."
        )
    return (mesh, axes) if axes else (None, ())


def _check(
    images: Float[Array, "batch embed"],
    texts: Float[Array, "batch *captions embed"],
    mesh: Mesh | None,
    axes: tuple[str, ...],
    method: str,
) -> None:
    if images.shape != (texts.shape[0], texts.shape[-1]):
        raise ValueError(f"Pairs differ in shape: {images.shape} and {texts.shape}.")
    if method not in LOSS_METHODS:
        raise UserError(f"Unknown loss.method {method!r}: choose one of {', '.join(LOSS_METHODS)}.")
    devices = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)
    if images.shape[0] % devices:
        raise UserError(
            f"A batch of {images.shape[0]} cannot be split evenly over {devices} devices: "
            "make batch_size a multiple of the devices."
        )


def _margin(
    images: Float[Array, "batch embed"],
    texts: Float[Array, "batch *captions embed"],
    logit_scale: Float[Array, ""],
    weights: Float[Array, " batch"] | None,
) -> Float[Array, ""]:
    """Computes the mean logit of the positives less that of all pairs.

    A cross-entropy is linear in its target. So smoothing adds this to it, times the fraction that
    is spread; and of the mean of all logits only the mean embeddings are needed.
    """
    images, texts = images.astype(jnp.float32), texts.astype(jnp.float32)
    texts = jnp.mean(texts, axis=tuple(range(1, texts.ndim - 1)))  # of each image's captions

    def mean(x):  # over the batch
        return jnp.mean(x if weights is None else weights[:, None] * x, axis=0)

    pairs = jnp.sum(mean(images) * texts.mean(axis=0) + images.mean(axis=0) * mean(texts)) / 2
    return jnp.exp(logit_scale) * (jnp.sum(mean(images * texts)) - pairs)


def _normalised(weights: Float[Array, " batch"] | None) -> Float[Array, " batch"] | None:
    """Scales weights to a mean of 1; all zero they remain."""
    if weights is None:
        return None
    weights = jax.lax.stop_gradient(weights.astype(jnp.float32))
    total = jnp.sum(weights)
    return weights / jnp.where(total > 0, total, 1) * len(weights)


def _rows(texts: Float[Array, "batch *captions embed"]) -> Float[Array, "texts embed"]:
    """Returns one caption a row."""
    return texts.reshape(-1, texts.shape[-1])


def _place(mesh: Mesh | None, axes: tuple[str, ...], *arrays: Any) -> tuple[Any, ...]:
    """Splits (trees of) embeddings over the batch, where the mesh wants that said.

    With automatic axis types the compiler moves data as needed. With explicit ones, the default of
    `jax.make_mesh`, each array carries its sharding in its type, and `shard_map` takes no other.
    """
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return arrays
    explicit = {n for n, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Explicit}
    split = PartitionSpec(tuple(axis for axis in axes if axis in explicit))

    def place(x):
        return jax.sharding.reshard(x, NamedSharding(mesh, split if x.ndim else PartitionSpec()))

    return jax.tree.map(place, arrays)  # None remains
