"""A detector of near-duplicates: an image tower alone, trained on two views of each image."""

import jax.numpy as jnp

from clip_jax.models.image_model import ImageModel, Inputs, Outputs


class NearDuplicates(ImageModel):
    """The paper's detector (appendix C): views of an image lie close together, others far apart."""

    def outputs(self, batch: Inputs, train: bool = False) -> Outputs:
        """Embeds all views of each image.

        Args:
          batch: images are uint8 [b, v, h, w, 3], v views, or [b, h, w, 3], one; captions are
            ignored.
          train: see `image_features`.

        Returns:
          "views" [b, v, embed_dim], L2-normalised.
        """
        images, rows = batch["image"], batch.get("row")
        b, views = images.shape[0], images.reshape(-1, *images.shape[-3:])
        count = len(views) // b
        if rows is not None:  # each view draws for itself
            rows = (count * rows[:, None] + jnp.arange(count)).reshape(-1)
        return {"views": self.encode_image(views, train, rows).reshape(b, count, -1)}
