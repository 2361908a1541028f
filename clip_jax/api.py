"""Using a trained model: load it, embed pictures and texts, classify."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import linen as nn
from PIL import Image

from clip_jax import checkpoint, sharding
from clip_jax.data import images as image_files
from clip_jax.data import tokenizer as tokenizers
from clip_jax.data.crops import CENTER
from clip_jax.errors import BadExample, UserError
from clip_jax.evals import zeroshot
from clip_jax.models import buckets

Picture = Image.Image | str | os.PathLike | np.ndarray
Pictures = Picture | Sequence[Picture]


class Model:
    """A trained model; made by `load`.

    Attributes:
      net: the Flax module, for those who want gradients or intermediate values.
      variables: what `net.apply` takes.
      tokenizer: of its texts.
    """

    def __init__(
        self, net: nn.Module, variables: Any, tokenizer: tokenizers.Tokenizer, batch_size: int = 64
    ):
        """Wraps a module; `batch_size`: pictures or texts per step, padded, so it compiles once."""
        self.net = net
        self.variables = variables
        self.tokenizer = tokenizer
        self._batch_size = batch_size
        self._image = jax.jit(lambda v, x: net.apply(v, x, method="encode_image"))
        self._text = jax.jit(lambda v, x: net.apply(v, x, method="encode_text"))

    def encode_image(self, images: Pictures) -> np.ndarray:
        """Embeds pictures.

        Args:
          images: PIL images, paths, or uint8 arrays [h, w, 3] of any size, one or many; or uint8
            [n, h, w, 3]. Each is resized on its shorter side and cropped to its middle square.

        Returns:
          float32 [n, embed_dim], L2-normalised.

        Raises:
          UserError: a file cannot be read, or is no picture.
        """
        pixels = [self._pixels(image) for image in _as_list(images)]
        size = self.net.size.image_size
        return self._batched(self._image, np.array(pixels, np.uint8).reshape(-1, size, size, 3))

    def encode_text(self, texts: str | Sequence[str], truncate: bool = False) -> np.ndarray:
        """Embeds texts.

        Args:
          texts: one or many.
          truncate: cut what is longer than the context, keeping the end token.

        Returns:
          float32 [n, embed_dim], L2-normalised.

        Raises:
          ValueError: a text is too long and `truncate` is not set.
        """
        tokens = self.tokenizer(texts, truncate=truncate)
        embeds = np.zeros((len(tokens), self.net.size.embed_dim), np.float32)
        for rows, batch in buckets.batches(tokens, self.net.size, self._batch_size):
            embeds[rows] = np.asarray(self._text(self.variables, batch))[: len(rows)]
        return embeds

    def zero_shot(
        self,
        images: Pictures,
        class_names: Sequence[str],
        templates: Sequence[str] = ("a photo of a {}.",),
    ) -> np.ndarray:
        """Classifies pictures by the names of the classes.

        Args:
          images: as for `encode_image`.
          class_names: alternatives of one class joined by "|".
          templates: prompts, each with one {} for the name; their embeddings are averaged.

        Returns:
          float32 [n, classes], probabilities.
        """
        prompts, owners = zeroshot.class_prompts(class_names, templates)
        classes = zeroshot.average_classes(self.encode_text(prompts), owners, len(class_names))
        scale = np.exp(np.asarray(self.variables["params"]["logit_scale"]))
        return np.asarray(jax.nn.softmax(scale * self.encode_image(images) @ classes.T, axis=-1))

    def _pixels(self, image: Picture) -> np.ndarray:
        key, size = "the picture", self.net.size.image_size
        try:
            if isinstance(image, (str, os.PathLike)):
                data = epath.Path(image).read_bytes()
                return image_files.pixels(data, str(image), size, CENTER, None)
            if isinstance(image, Image.Image):
                return image_files.pixels(image, key, size, CENTER, None)
            array = np.asarray(image)
            if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
                raise UserError(
                    f"A picture as an array is uint8 [h, w, 3], not {array.dtype} {array.shape}."
                )
            return image_files.pixels(array, key, size, CENTER, None)
        except (OSError, BadExample) as error:
            raise UserError(f"Cannot read the picture: {error}.") from error

    def _batched(self, function: Any, rows: np.ndarray) -> np.ndarray:
        parts = [np.zeros((0, self.net.size.embed_dim), np.float32)]
        for start in range(0, len(rows), self._batch_size):
            part = rows[start : start + self._batch_size]
            padded = np.zeros((self._batch_size, *rows.shape[1:]), rows.dtype)
            padded[: len(part)] = part
            parts.append(np.asarray(function(self.variables, padded))[: len(part)])
        return np.concatenate(parts)


def _as_list(images: Pictures) -> list[Picture]:
    if isinstance(images, (Image.Image, str, os.PathLike)):
        return [images]
    if isinstance(images, np.ndarray) and images.ndim == 3:
        return [images]
    return list(images)


def load(path: epath.PathLike, step: int | None = None) -> Model:
    """Loads a trained model onto the first device.

    Args:
      path: a workdir, or one of its checkpoints ("runs/quickstart/checkpoints/1500").
      step: which checkpoint of a workdir; None: the most recent.

    Raises:
      UserError: there is no checkpoint, or it is damaged or of another tokenizer.
    """
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    net, variables, meta = checkpoint.load_model(path, mesh, step)
    tokens = tokenizers.create(meta["config"]["tokenizer"], net.size.context_length)
    if tokens.identity != meta["tokenizer"]:
        raise UserError(
            f"{path} was trained with the tokenizer {meta['tokenizer']}, but "
            f"{meta['config']['tokenizer']!r} is now {tokens.identity}."
        )
    return Model(net, variables, tokens)
