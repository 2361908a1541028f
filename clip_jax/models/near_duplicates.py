"""A detector of near-duplicates (paper, appendix C): views of an image lie close, others far."""

import jax
import jax.numpy as jnp

from clip_jax.models.image_model import ImageModel


class NearDuplicates(ImageModel):
    """An image tower alone; pure `init` and `apply`. Trained on two views of each image."""

    def __call__(
        self,
        images: jax.Array,
        tokens: jax.Array,
        train: bool = False,
        rows: jax.Array | None = None,
    ) -> tuple[jax.Array, ...]:
        """Embeds all views of each image.

        Args:
          images: uint8 [b, v, h, w, 3], v views; or [b, h, w, 3], one.
          tokens: not looked at.
          train, rows: as in `image_features`.

        Returns:
          v embeddings, float32 [b, embed_dim] each, L2-normalised.
        """
        del tokens
        b, views = images.shape[0], images.reshape(-1, *images.shape[-3:])
        count = len(views) // b
        if rows is not None:  # each view draws for itself
            rows = (count * rows[:, None] + jnp.arange(count)).reshape(-1)
        embeds = self.encode_image(views, train, rows).reshape(b, count, -1)
        return tuple(jnp.unstack(embeds, axis=1))
