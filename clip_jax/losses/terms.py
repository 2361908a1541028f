"""Types, products and the terms of a pair, shared by the gathered and the ring losses."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

Axes = tuple[str, ...]  # mesh axes that split the batch, outermost first
Images = Float[Array, "n embed"]
Texts = Float[Array, "m embed"]  # m = c * n: rows c * i to c * (i + 1) are the captions of image i
Scalar = Float[Array, ""]
Weights = Float[Array, " n"] | None  # of the images, 1 on average; None: all count the same

WHOLE = PartitionSpec()  # the same on every device
_HIDDEN = -1e30  # logit of a pair that does not count; finite, so that 0 times it is 0


def dot(
    subscripts: str, a: Float[Array, "n m"], b: Float[Array, "k l"]
) -> Float[Array, "rows columns"]:
    """Multiplies matrices: float32 sums; true float32 products where the inputs are float32.

    At the default precision accelerators would round float32 inputs to fewer bits.
    """
    return jnp.einsum(
        subscripts,
        a,
        b,
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
    )


def hide_twins(
    logits: Float[Array, "n m"], rows: Int[Array, " n"], columns: Int[Array, " m"]
) -> Float[Array, "n m"]:
    """Takes the similarity of each view to itself out of the logits; see `losses.views_loss`.

    Args:
      logits: scaled similarities of views.
      rows, columns: places in the batch. Places 2i and 2i + 1 are the two views of an image; in the
        columns they have changed places.
    """
    return jnp.where((rows ^ 1)[:, None] == columns[None], _HIDDEN, logits)


def sigmoid_terms(
    products: Float[Array, "n m"],
    positive: Bool[Array, "n m"],
    logit_scale: Scalar,
    logit_bias: Scalar,
    weights: Float[Array, "n m"] | None,
) -> tuple[Float[Array, "n m"], Float[Array, "n m"], Float[Array, "n m"]]:
    """Computes each pair's loss, and the derivatives of that by its logit and by logit_scale.

    Args:
      products: similarities.
      positive: whether image and text belong together.
      logit_scale, logit_bias: see `losses.sigmoid_loss`.
      weights: weight of each pair; None: 1.
    """
    scaled = jnp.exp(logit_scale) * products
    wrong = jnp.where(positive, -1.0, 1.0)  # the sign that makes a high logit a mistake
    logits = wrong * (scaled + logit_bias)
    terms, d_logits = jax.nn.softplus(logits), wrong * jax.nn.sigmoid(logits)
    if weights is not None:
        terms, d_logits = weights * terms, weights * d_logits
    return terms, d_logits, d_logits * scaled


def pair_weights(images: Weights, texts: Float[Array, " m"] | None) -> Float[Array, "n m"] | None:
    """Returns the mean of the weights of image and text, for all pairs of them."""
    return None if images is None or texts is None else (images[:, None] + texts[None]) / 2


def by_caption(weights: Weights, captions: int) -> Float[Array, " m"] | None:
    """Repeats the weight of each image for its captions."""
    return None if weights is None else jnp.repeat(weights, captions)


def scale_gradients(
    gradients: tuple[Float[Array, "..."], ...], gradient: Scalar
) -> tuple[Float[Array, "..."], ...]:
    """Runs the backward pass of a loss whose forward pass has computed the gradients."""
    return tuple((gradient * g).astype(g.dtype) for g in gradients)
