"""Pages from templates, which extend base.html.jinja and its style."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from clip_jax.common import formatting
from clip_jax.common.pages import svg
from clip_jax.storage import writing

_CRISP = 64  # pixels: images up to this size are stored exactly and enlarged without smoothing
_LARGEST = 160  # pixels: larger images are reduced to this, to keep the page small


def write(path: epath.PathLike, template: Path, *others: Path, **values: Any) -> None:
    """Renders a template to a file.

    Args:
      path: local, gs:// or s3://.
      template: path of the template.
      *others: directories of further templates that it imports.
      **values: variables of the template.
    """
    folders = [template.parent, *others, Path(__file__).parent]
    environment = Environment(
        loader=FileSystemLoader(folders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": formatting.percent,
        "duration": formatting.format_seconds,
        "short": formatting.short,
        "image": image,
        "number": lambda value: f"{value:,}",
    }
    text = environment.get_template(template.name).render(dashes=svg.DASHES, **values)
    # Captions come from the web: a lone surrogate must not lose the page.
    writing.write(epath.Path(path), text.encode("utf-8", "replace"))


@dataclass(frozen=True)
class Thumbnail:
    """A picture inside a page.

    Attributes:
      src: data URI.
      width, height: pixels.
      crisp: whether it is stored exactly and enlarged without smoothing.
    """

    src: str
    width: int
    height: int
    crisp: bool


Picture = UInt8[np.ndarray, "h w 3"] | Image.Image | Thumbnail


def thumbnail(picture: Picture) -> Thumbnail:
    """Reduces a large picture, to keep the page small."""
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


def image(picture: Picture) -> Markup:
    """Returns the attributes src, width, height and class of an <img>."""
    small = thumbnail(picture)
    text = Markup('src="{}" width="{}" height="{}"{}')
    return text.format(small.src, small.width, small.height, " class=crisp" * small.crisp)
