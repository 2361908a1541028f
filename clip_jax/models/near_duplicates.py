"""A detector of near-duplicates: an image tower alone, trained on two views of each image."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from clip_jax.models.image_model import Embeds, ImageModel, RowIds, TokenIds


class NearDuplicates(ImageModel):
    """The paper's detector (appendix C): views of an image lie close together, others far apart."""

    def __call__(
        self,
        images: Shaped[Array | np.ndarray, "batch *views height width 3"],
        tokens: TokenIds,
        train: bool = False,
        rows: RowIds | None = None,
    ) -> tuple[Embeds, ...]:
        """Embeds all views of each image.

        Args:
          images: uint8 [b, v, h, w, 3], v views; or [b, h, w, 3], one.
          tokens: ignored.
          train, rows: see `image_features`.

        Returns:
          v embeddings of each image, L2-normalised.
        """
        del tokens
        b, views = images.shape[0], images.reshape(-1, *images.shape[-3:])
        count = len(views) // b
        if rows is not None:  # each view draws for itself
            rows = (count * rows[:, None] + jnp.arange(count)).reshape(-1)
        embeds = self.encode_image(views, train, rows).reshape(b, count, -1)
        return tuple(jnp.unstack(embeds, axis=1))
