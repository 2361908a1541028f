"""Inference with a trained model: load it, embed images and texts, classify."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import linen as nn
from jaxtyping import Float, Int, UInt8
from PIL import Image

from clip_jax import models, sharding, weights
from clip_jax.choices import TEMPLATES
from clip_jax.data import images as image_files
from clip_jax.data import tokenizer as tokenizers
from clip_jax.data.crops import Crop
from clip_jax.errors import BadExample, UserError
from clip_jax.models import buckets
from clip_jax.models.prompts import (
    as_texts,
    average_classes,
    class_prompts,
    class_scores,
    prepare,
)
from clip_jax.storage import faults, locations, ranges
from clip_jax.weights.model import Weights

Picture = Image.Image | str | os.PathLike | np.ndarray
Pictures = Picture | Sequence[Picture]


class Model:
    """A trained model; made by `load`.

    Attributes:
      net: the Flax module, for those who want gradients or intermediate values.
      variables: parameters and statistics, for `net.apply`.
      tokenizer: tokenizer of its texts; None: not known.
      about: architecture, origin and preprocessing in words; its repr.
    """

    def __init__(
        self,
        net: nn.Module,
        variables: Any,
        tokenizer: tokenizers.Tokenizer | None,
        batch_size: int = 32,
        about: str = "",
    ):
        """Wraps a module.

        Args:
          net: one of `clip_jax.models.MODULES`.
          variables: parameters and statistics, for `net.apply`.
          tokenizer: tokenizer of its texts; None: not known.
          batch_size: images or texts per step. The last of several steps is padded, and so needs
            no program of its own; a single smaller step is padded to a power of two.
          about: description in words.
        """
        self.net = net
        self.variables = variables
        self.tokenizer = tokenizer
        self.about = about
        self._batch_size = batch_size
        self._crop = Crop(net.size.image_crop, filter=net.size.image_filter)
        self._image = jax.jit(lambda v, x: net.apply(v, x, method="encode_image"))
        self._text = jax.jit(lambda v, x: net.apply(v, x, method="encode_text"))
        self._scores = jax.jit(partial(class_scores, net), static_argnames="classes")

    @classmethod
    def from_weights(cls, opened: Weights) -> "Model":
        """Puts what `weights.open` returned onto the first device.

        Raises:
          UserError: it is damaged, or of another tokenizer than the one on disk.
        """
        tokenizer = opened.tokenizer.create(opened.size.context_length)
        mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
        net, variables = models.of_size(opened.size), opened.variables(mesh)
        return cls(net, variables, tokenizer, about=opened.describe())

    def __repr__(self) -> str:
        return self.about or super().__repr__()

    def encode_image(self, images: Pictures) -> Float[np.ndarray, "n embed"]:
        """Embeds images.

        Args:
          images: PIL images, paths (local, gs:// or s3://), or uint8 arrays [h, w, 3] of any size,
            one or many; or uint8 [n, h, w, 3]. Each is resized on its shorter side and cropped to
            its middle square; or, for SigLIP, squashed to a square.

        Returns:
          float32 [n, embed_dim], L2-normalised.

        Raises:
          UserError: a file cannot be read, or is no image.
        """
        return self._batched(self._image, images, self.net.size.embed_dim)

    def encode_text(
        self, texts: str | Sequence[str], truncate: bool = False
    ) -> Float[np.ndarray, "n embed"]:
        """Embeds texts.

        Args:
          texts: one or many.
          truncate: cut texts that are longer than the context, keeping the end token.

        Returns:
          float32 [n, embed_dim], L2-normalised.

        Raises:
          ValueError: a text is too long and `truncate` is not set.
          UserError: the model's tokenizer is not known, or it embeds no texts.
        """
        if not hasattr(self.net, "encode_text"):
            raise UserError(
                f"This model was trained for {self.net.size.objective}: it embeds images, but no "
                "texts. Take one that was trained with --config.objective=contrastive."
            )
        tokens = self._tokens(texts, truncate)
        encode = partial(self._text, self.variables)
        return buckets.embed(encode, tokens, self.net.size, self._step_size(len(tokens)))

    def zero_shot(
        self,
        images: Pictures,
        class_names: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
    ) -> Float[np.ndarray, "n classes"]:
        """Classifies images by the names of the classes.

        Args:
          images: images, in any form that `encode_image` takes.
          class_names: names of the classes; alternatives for one class are joined by "|".
          templates: prompts, each with one {} for the name. Their embeddings are averaged; for a
            model that predicts captions, their likelihoods.

        Returns:
          float32 [n, classes], probabilities.

        Raises:
          UserError: the model cannot score text, a picture cannot be read, or the names and
            templates are no lists of texts.
        """
        class_names = as_texts(class_names, "class names", "cat")
        templates = as_texts(templates, "templates", *TEMPLATES)
        if twice := [name for name, count in Counter(class_names).items() if count > 1]:
            raise UserError(
                f"The class name {twice[0]!r} is given twice: the two would share its probability."
            )
        prompts, class_ids = class_prompts(class_names, templates)
        if hasattr(self.net, "score"):
            prepared = prepare(self._tokens(prompts, truncate=False))
            count = len(class_names)
            score = partial(self._scores, prompts=prepared, class_ids=class_ids, classes=count)
            logits = self._batched(score, images, count)
            return np.asarray(jax.nn.softmax(logits, axis=-1))
        classes = average_classes(self.encode_text(prompts), class_ids, len(class_names))
        scale = np.exp(np.asarray(self.variables["params"]["logit_scale"]))
        return np.asarray(jax.nn.softmax(scale * self.encode_image(images) @ classes.T, axis=-1))

    def _tokens(self, texts: str | Sequence[str], truncate: bool) -> Int[np.ndarray, "n s"]:
        if self.tokenizer is None:
            raise UserError(
                "The weights came without a tokenizer: convert them once more with --tokenizer and "
                "the vocabulary file that was published with them."
            )
        texts = [texts] if isinstance(texts, str) else as_texts(texts, "texts", "a cat")
        return self.tokenizer(texts, truncate=truncate)

    def _pixels(self, image: Any, wait: Callable[[], bytes] | None) -> UInt8[np.ndarray, "h w 3"]:
        key, size = "the picture", self.net.size.image_size
        try:
            if wait is not None:
                return image_files.pixels(wait(), str(image), size, self._crop, None)
            if isinstance(image, Image.Image):
                return image_files.pixels(image, key, size, self._crop, None)
            array = _as_array(image)
            return image_files.pixels(array, key, size, self._crop, None)
        except UserError:
            raise
        except Exception as error:
            if isinstance(error, (OSError, BadExample)) or faults.is_failure(error):
                raise UserError(f"Cannot read the picture: {error}.") from error
            raise

    def _batched(
        self, function: Any, images: Pictures, width: int
    ) -> Float[np.ndarray, "n {width}"]:
        """Applies a function to the images step by step.

        The images of a step are read while the step before is computed.
        """
        pictures, side = _as_list(images), self.net.size.image_size
        size = self._step_size(len(pictures))
        parts: list[Any] = [np.zeros((0, width), np.float32)]
        for start in range(0, len(pictures), size):
            pixels = np.zeros((size, side, side, 3), np.uint8)
            step = pictures[start : start + size]
            for row, picture, wait in zip(pixels, step, list(map(_begin, step))):
                row[:] = self._pixels(picture, wait)
            parts[-1] = np.asarray(parts[-1])  # so that no more than one step is waiting
            parts.append(function(self.variables, pixels))
        return np.concatenate(parts)[: len(pictures)]

    def _step_size(self, rows: int) -> int:
        """Returns the rows per step; a single image is not padded to a whole batch."""
        return min(self._batch_size, 1 << max(rows - 1, 0).bit_length())


def _begin(picture: Any) -> Callable[[], bytes] | None:
    """Starts reading a path; returns a function that waits for the bytes, None: it is no path."""
    if not isinstance(picture, (str, os.PathLike)):
        return None
    return ranges.start_whole(locations.parse(picture))


def _as_list(images: Pictures) -> list[Any]:
    """Returns one or many images as a list; each is checked when it is read."""
    if isinstance(images, (Image.Image, str, os.PathLike)):
        return [images]
    if isinstance(images, (bytes, bytearray, Mapping, Set)) or not isinstance(images, Iterable):
        raise UserError(_no_picture(images))
    if hasattr(images, "__array__"):  # arrays of NumPy and JAX, tensors of PyTorch
        array = np.asarray(images)
        return list(array) if array.ndim == 4 or array.dtype.kind in "OU" else [array]
    return list(images)


def _as_array(image: Any) -> UInt8[np.ndarray, "h w 3"]:
    """Returns a picture that is neither a Pillow image nor a path; UserError where it is none."""
    if not hasattr(image, "__array__"):
        raise UserError(_no_picture(image))
    array = np.asarray(image)
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3 and array.size:
        return array
    hint = ""
    if array.dtype.kind == "f":
        hint = " Values from 0 to 1 become pixels by (255 * x).round().astype(numpy.uint8)."
    elif array.ndim == 3 and array.shape[0] in (1, 3, 4):
        hint = " The channels come last: array.transpose(1, 2, 0)."
    elif array.ndim == 2 or array.shape[-1:] in ((1,), (4,)):
        hint = " PIL.Image.fromarray makes a picture of grey values, or of four channels."
    raise UserError(
        f"A picture as an array is uint8 [h, w, 3], not {array.dtype} {array.shape}.{hint}"
    )


def _no_picture(value: Any) -> str:
    return (
        f"{value!r:.60} is no picture: give a Pillow image, a path, or an array uint8 [h, w, 3], "
        "one or a list of them. Bytes of a file are opened by PIL.Image.open(io.BytesIO(data))."
    )


def load(path: epath.PathLike, step: int | None = None) -> Model:
    """Loads a trained model onto the first device.

    Args:
      path: a workdir, or one of its checkpoints ("runs/quickstart/checkpoints/1500"); weights in
        any format that `python -m clip_jax convert` reads and that says what they are; each local,
        gs:// or s3://; or a name on the Hugging Face hub ("org/name"), fetched once.
      step: step of a checkpoint in a workdir; None: the most recent.

    Raises:
      UserError: there is no model, or it is damaged or of another tokenizer.
    """
    return Model.from_weights(weights.open(path, step=step))
