"""Pictures as a page holds them; apart from the plots, which import matplotlib."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

_CRISP = 64  # pixels: images up to this size are kept exactly and enlarged without smoothing
_LARGEST = 160  # pixels: larger images are reduced to it, for the size of the file


@dataclass(frozen=True)
class Thumbnail:
    """A picture, encoded.

    Attributes:
      src: data URI.
      width, height: pixels.
      crisp: kept exactly, to be enlarged without smoothing.
    """

    src: str
    width: int
    height: int
    crisp: bool


Picture = np.ndarray | Image.Image | Thumbnail  # arrays are uint8 [h, w, 3]


def thumbnail(picture: Picture) -> Thumbnail:
    """Encodes a picture, reduced if it is large, for the size of the file."""
    if isinstance(picture, Thumbnail):
        return picture
    small = picture if isinstance(picture, Image.Image) else Image.fromarray(np.asarray(picture))
    small, file = small.copy(), io.BytesIO()
    crisp = max(small.size) <= _CRISP
    if crisp:
        small.save(file, "PNG", optimize=True)
    else:
        small.thumbnail((_LARGEST, _LARGEST))
        small.save(file, "JPEG", quality=80, optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    kind = "png" if crisp else "jpeg"
    return Thumbnail(f"data:image/{kind};base64,{data}", *small.size, crisp)
