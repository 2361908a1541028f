"""Noise with random captions, for benchmarks."""

import math

import numpy as np

from clip_jax.data.sources.base import Example, Request
from clip_jax.data.sources.captions import Captions
from clip_jax.errors import UserError


def open_source(request: Request) -> "Synthetic":
    """Opens a source of type "synthetic"."""
    return Synthetic(request.spec.size, request.image_size, request.seed)


_WORDS = ("a", "the", "red", "small", "old", "dog", "cat", "house", "tree", "on", "under", "near")

_SHIFTS = 2**20  # images that synthetic noise is cut into


class Synthetic:
    """Noise with random captions, for benchmarks: nothing to read or decode."""

    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def __init__(self, size: int, image_size: int, seed: int):
        if size < 1:
            raise UserError(f"A synthetic source needs source.size of at least 1, not {size}.")
        self._size = size
        self._shape = (image_size, image_size, 3)
        self._seed = seed
        # To draw the bytes of each image anew would hold up the other threads.
        noise = np.random.default_rng(seed).bytes(math.prod(self._shape) + _SHIFTS)
        self._noise = np.frombuffer(noise, np.uint8)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng([self._seed, index])
        start = rng.integers(_SHIFTS)
        image = self._noise[start : start + math.prod(self._shape)].reshape(self._shape)
        text = " ".join(rng.choice(_WORDS, size=rng.integers(4, 17)))
        return Example(image, Captions((text,), (1.0,)), labels=(), key=f"synthetic {index}")
