"""Both towers, jitted over the mesh, for whole data sets with ragged ends."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.data import images, pipeline
from clip_jax.data.crops import Crop
from clip_jax.data.feed import Feed
from clip_jax.data.sources.base import Source
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.models import buckets, scores
from clip_jax.models.prompts import Prompts
from clip_jax.sharding import to_host

Variables = Mapping[str, Any]


class Encoder:
    """Embeds data sets; every host passes the same arguments and gets the same, whole results.

    Attributes:
      batch_size: images or captions per step over all devices, a multiple of their number.
      image_size: pixels along a side.
      mesh: devices that share each batch.
      embeds_texts: whether the model has a text tower: `texts` can be called.
      scores_prompts: whether the model says how likely a prompt is: `scores` can be called.
      can_score_text: one of the two.
    """

    def __init__(self, net: nn.Module, mesh: Mesh, batch_size: int, threads: int):
        """Compiles nothing yet.

        Args:
          net: one of `clip_jax.models.MODULES`.
          mesh: devices to split each batch over.
          batch_size: wished for; rounded up to a multiple of the devices.
          threads: that read and decode on each host; 0: one per CPU core.
        """
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        self.image_size = net.size.image_size
        self._size = net.size
        self._crop = Crop(net.size.image_crop)
        self.mesh = mesh
        self.embeds_texts = hasattr(net, "encode_text")
        self.scores_prompts = hasattr(net, "score")
        self.can_score_text = self.embeds_texts or self.scores_prompts
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

        self._image = jax.jit(image, out_shardings=whole)
        self._features = jax.jit(features, out_shardings=whole)
        self._text = jax.jit(text, out_shardings=whole)
        score = partial(scores.class_scores, net)
        self._score = jax.jit(score, out_shardings=whole, static_argnums=4)
        self._gather = jax.jit(lambda batch: batch, out_shardings=whole)

    def texts(
        self, variables: Variables, tokens: np.ndarray, *, by_length: bool = False
    ) -> np.ndarray:
        """Embeds texts.

        Args:
          variables: of the model.
          tokens: int32 [n, s].
          by_length: do not compute their padding (see `buckets.batches`): a program for each of a
            few lengths, which is worth compiling for many texts.

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
        self,
        variables: Variables,
        source: Source,
        limit: int | None = None,
        features: bool = False,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Embeds the images of a source in stored order, unusable ones left out.

        Args:
          variables: of the model.
          source: of the images.
          limit: the first so many; None: all.
          features: what linear probes read is wanted too.

        Yields:
          "embed" float32 [m, embed_dim], "label" int32 [m], "index" int32 [m] in the source, and
          "features" float32 [m, f] where wanted; m is at most batch_size.
        """

        def embed(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            if not features:
                return {"embed": self._image(variables, batch["image"])}
            return dict(zip(("embed", "features"), self._features(variables, batch["image"])))

        yield from self.each(embed, source, limit)

    def scores(
        self,
        variables: Variables,
        source: Source,
        prompts: Prompts,
        owners: np.ndarray,
        classes: int,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Scores classes for the images of a source; see `scores.class_scores`.

        Yields:
          "scores" float32 [m, classes], "label" and "index" as `images` does.
        """
        rest = prompts, owners, classes
        yield from self.each(
            lambda batch: {"scores": self._score(variables, batch["image"], *rest)}, source
        )

    def each(
        self,
        compute: Callable[[Mapping[str, jax.Array]], Mapping[str, jax.Array]],
        source: Source,
        limit: int | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """What `compute` makes of each batch, as `images` yields it.

        Args:
          compute: of "image" uint8 [b, h, w, 3], "label" and "index" in the source, split over the
            mesh; returns arrays by name that are whole on every device.
          source, limit: as in `images`.

        Yields:
          These arrays and the rest of the batch, unusable images left out.
        """
        part, parts = sharding.process_share(self.mesh)
        batches = pipeline.eval_batches(
            source,
            batch_size=self.batch_size,
            image_size=self.image_size,
            crop=self._crop,
            part=part,
            parts=parts,
            threads=self._threads,
            limit=limit,
        )
        for batch in Feed(batches, self._sharding, depth=2):
            with jax.set_mesh(self.mesh):
                found = compute(batch)
                batch.pop("image")
                found = {**self._gather(batch), **found}
            rows = {name: to_host(value) for name, value in found.items()}
            mask = rows.pop("mask")
            yield {name: value[mask] for name, value in rows.items()}

    def captions(
        self, source: Source, tokenizer: Tokenizer, limit: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all captions of a source, and their examples, as `pipeline.eval_captions`."""
        return pipeline.eval_captions(source, tokenizer, threads=self._threads, limit=limit)

    def picture(self, source: Source, index: int) -> np.ndarray:
        """One image of a source as the model sees it, uint8 [h, w, 3]."""
        example = source[index]
        return images.pixels(example.image, example.key, self.image_size, self._crop, None)


def put_rows(rows: np.ndarray, count: int, mesh: Mesh) -> jax.Array:
    """Rows that every host holds, zero-padded to `count` and split over the mesh."""
    padded = np.zeros((count, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    return jax.make_array_from_callback(
        padded.shape, sharding.batch_sharding(mesh), lambda index: padded[index]
    )
