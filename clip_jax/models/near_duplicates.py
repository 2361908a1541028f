"""A detector of near-duplicates: an image tower alone, trained on two views of each image."""

from clip_jax.models.image_model import ImageModel, Inputs, Outputs, flat_views


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
        views, rows = flat_views(batch["image"], batch.get("row"))
        embeds = self.encode_image(views, train, rows)
        return {"views": embeds.reshape(len(batch["image"]), -1, self.size.embed_dim)}
