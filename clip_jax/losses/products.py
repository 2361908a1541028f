"""Matrix products of embeddings."""

import jax
import jax.numpy as jnp


def dot(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum with float32 sums; true float32 products where the inputs are float32."""
    return jnp.einsum(
        subscripts,
        a,
        b,
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
    )
