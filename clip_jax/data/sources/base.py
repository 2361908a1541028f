"""Examples and the sources that give them, whatever they are stored in."""

import dataclasses
from typing import Protocol

import numpy as np

from clip_jax.data.sources.captions import Captions

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")


@dataclasses.dataclass(frozen=True)
class Example:
    """One image-text pair as stored.

    Attributes:
      image: an encoded file, or uint8 [h, w, 3].
      captions: all of them, and how often training draws each; none where the set has none.
      labels: class indices, each once; none where it has no class, or none of those that count.
      key: names the example in messages.
      groups: what the source's `group_keys` hold, "" where there is nothing; for bias probes.
    """

    image: bytes | np.ndarray
    captions: Captions
    labels: tuple[int, ...]
    key: str
    groups: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The first caption, which evaluation takes; "" where there is none."""
        return self.captions.texts[0] if self.captions.texts else ""

    @property
    def label(self) -> int:
        """The first class, for sets with one per example; -1: none."""
        return self.labels[0] if self.labels else -1


class Source(Protocol):
    """Random access to examples; called from many threads at once.

    One that reads from where many reads at once are worth it has a method `start` too, as `start`
    below.

    Attributes:
      class_names: by label; empty where the set has no classes, or only their numbers.
      templates: prompt templates natural to the set, such as "a photo of a {}."; may be empty.
    """

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def templates(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """The example stored at `index`, the same at every call; may raise BadExample."""
        ...
