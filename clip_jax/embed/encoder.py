"""Both towers, jitted over the mesh, for whole data sets whose last batch is not full."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from clip_jax import sharding
from clip_jax.data import images, pipeline
from clip_jax.data.crops import Crop
from clip_jax.data.feed import Feed
from clip_jax.data.sources.base import Source
from clip_jax.models import buckets
from clip_jax.models.prompts import Prompts, class_scores
from clip_jax.models.views import two_views
from clip_jax.sharding import to_host

Variables = Mapping[str, Any]


class Encoder:
    """Embeds data sets; every host passes the same arguments and gets the same, whole results.

    Attributes:
      batch_size: images or texts per step over all devices, a multiple of their number.
      image_size: pixels along a side.
      mesh: devices that share each batch.
      embeds_texts: whether the model has a text tower, so that `texts` can be called.
      scores_prompts: whether the model gives the likelihood of a prompt, so that `scores` can be.
      can_score_text: whether the model can do either of these.
      detects_duplicates: whether it was trained on two views of each image, as `views` makes them.
    """

    def __init__(self, net: nn.Module, mesh: Mesh, batch_size: int, threads: int):
        """Compiles nothing yet.

        Args:
          net: one of `clip_jax.models.MODULES`.
          mesh: devices to split each batch over.
          batch_size: images or texts per step; rounded up to a multiple of the devices.
          threads: threads that read and decode on each host; 0: one per CPU core.
        """
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        self.image_size = net.size.image_size
        self._size = net.size
        self._crop = Crop(net.size.image_crop, filter=net.size.image_filter)
        self.mesh = mesh
        self.embeds_texts = hasattr(net, "encode_text")
        self.scores_prompts = hasattr(net, "score")
        self.can_score_text = self.embeds_texts or self.scores_prompts
        self.detects_duplicates = net.size.objective == "near_duplicates"
        self._threads = threads
        self._sharding = sharding.batch_sharding(mesh)
        whole = sharding.replicated(mesh)

        def image(variables, pixels):
            return net.apply(variables, pixels, method="encode_image")

        def text(variables, tokens):
            return net.apply(variables, tokens, method="encode_text")

        def features(variables, pixels):
            both, _ = net.apply(
                variables, pixels, method="encode_with_features", mutable=["intermediates"]
            )
            return both

        def view_pairs(variables, pixels, numbers, settings, seed):
            pairs = two_views(pixels, jax.random.key(seed), settings, numbers)
            flat: Any = image(variables, pairs.reshape(-1, *pixels.shape[1:]))
            return flat.reshape(len(pixels), 2, -1)

        self._image = jax.jit(image, out_shardings=whole)
        self._features = jax.jit(features, out_shardings=whole)
        self._text = jax.jit(text, out_shardings=whole)
        self._views = jax.jit(view_pairs, out_shardings=whole, static_argnums=(3, 4))
        score = partial(class_scores, net)
        self._score = jax.jit(score, out_shardings=whole, static_argnums=4)
        self._gather = jax.jit(lambda batch: batch, out_shardings=whole)

    def texts(
        self, variables: Variables, tokens: np.ndarray, *, by_length: bool = False
    ) -> np.ndarray:
        """Embeds texts.

        Args:
          variables: variables of the model.
          tokens: int32 [n, s].
          by_length: cut batches to the length of their texts, so that little compute is spent on
            padding (see `buckets.batches`). It takes a program for each of a few lengths, which
            is worth compiling for many texts.

        Returns:
          float32 [n, embed_dim], L2-normalised.
        """

        def encode(batch: np.ndarray) -> np.ndarray:
            placed = put_rows(batch, self.batch_size, self.mesh)
            with jax.set_mesh(self.mesh):
                return to_host(self._text(variables, placed))

        if by_length:
            return buckets.embed(encode, tokens, self._size, self.batch_size)
        starts = range(0, len(tokens), self.batch_size)
        parts = [tokens[start : start + self.batch_size] for start in starts]
        return np.concatenate([encode(part)[: len(part)] for part in parts])

    def images(
        self, variables: Variables, source: Source, features: bool = False
    ) -> Iterator[dict[str, np.ndarray]]:
        """Embeds the images of a source in stored order, without the unusable ones.

        Args:
          variables: variables of the model.
          source: images.
          features: whether pre-projection features are wanted too.

        Yields:
          "embed" float32 [m, embed_dim], "label" int32 [m], "index" int32 [m] in the source, and
          "features" float32 [m, f] where wanted; m is at most batch_size.
        """

        def embed(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            if not features:
                return {"embed": self._image(variables, batch["image"])}
            return dict(zip(("embed", "features"), self._features(variables, batch["image"])))

        yield from self.each(embed, source)

    def scores(
        self,
        variables: Variables,
        source: Source,
        prompts: Prompts,
        class_ids: np.ndarray,
        classes: int,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Scores classes for the images of a source; see `prompts.class_scores`.

        Yields:
          "scores" float32 [m, classes], "label" and "index" as `images` does.
        """
        yield from self.each(
            lambda batch: {
                "scores": self._score(variables, batch["image"], prompts, class_ids, classes)
            },
            source,
        )

    def views(
        self, variables: Variables, source: Source, settings: FrozenConfigDict, seed: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """Embeds two views of each image of a source, which its index and the seed determine.

        Args:
          variables: variables of the model.
          source: images.
          settings: fields of `data.views` in configs/default.py.
          seed: non-negative.

        Yields:
          "embed" float32 [m, 2, embed_dim], "label" and "index" as `images` does.
        """
        yield from self.each(
            lambda batch: {
                "embed": self._views(variables, batch["image"], batch["index"], settings, seed)
            },
            source,
        )

    def each(
        self,
        compute: Callable[[Mapping[str, jax.Array]], Mapping[str, jax.Array]],
        source: Source,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Applies a function to the batches of a source.

        Args:
          compute: called with "image" uint8 [b, h, w, 3], "label" and "index" in the source, split
            over the mesh; returns arrays by name that are whole on every device.
          source: images.

        Yields:
          The arrays returned and the rest of the batch, without the rows of unusable images.
        """
        part, parts = sharding.process_part(self.mesh)
        batches = pipeline.eval_batches(
            source,
            batch_size=self.batch_size,
            image_size=self.image_size,
            crop=self._crop,
            part=part,
            parts=parts,
            threads=self._threads,
        )
        for batch in Feed(batches, self._sharding, depth=2):
            with jax.set_mesh(self.mesh):
                found = compute(batch)
                batch.pop("image")
                found = {**self._gather(batch), **found}
            rows = {name: to_host(value) for name, value in found.items()}
            mask = rows.pop("mask")
            yield {name: value[mask] for name, value in rows.items()}

    def picture(self, source: Source, index: int) -> np.ndarray:
        """Returns one image of a source as the model sees it, uint8 [h, w, 3]."""
        example = source[index]
        return images.pixels(example.image, example.key, self.image_size, self._crop, None)


def put_rows(rows: np.ndarray, count: int, mesh: Mesh) -> jax.Array:
    """Splits rows that every host holds over the mesh, zero-padded to `count`."""
    padded = np.zeros((count, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    return jax.make_array_from_callback(
        padded.shape, sharding.batch_sharding(mesh), lambda index: padded[index]
    )
