"""Templates to files. A template extends base.html.jinja, which has the style of all pages."""

import base64
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from clip_jax.common.pages import svg
from clip_jax.storage import writing

_CRISP = 64  # pixels: images up to this size are kept exactly and enlarged without smoothing
_LARGEST = 160  # pixels: larger images are reduced to it, for the size of the file


def write(path: epath.PathLike, template: Path, *others: Path, **values: Any) -> None:
    """Writes a page.

    Args:
      path: local, gs:// or s3://.
      template: the file.
      *others: directories of templates that it imports, besides its own and this one.
      **values: for its variables.
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
        "percent": percent,
        "duration": duration,
        "short": svg.short,
        "image": image,
        "number": lambda value: f"{value:,}",
    }
    text = environment.get_template(template.name).render(dashes=svg.DASHES, **values)
    # Captions come from the web: a lone surrogate must not lose the page.
    writing.write(epath.Path(path), text.encode("utf-8", "replace"))


def percent(share: float) -> str:
    """A fraction in per cent: "95.8 %"; more digits where it is tiny; a dash for NaN."""
    if math.isnan(share):
        return "–"
    points = 100 * share
    text = f"{points:.1f}" if points == 0 or abs(points) >= 1 else f"{points:.2g}"
    return f"{text}\N{NO-BREAK SPACE}%"


def duration(seconds: float) -> str:
    """Two units of time at most: "42 s", "3 min 42 s", "2 d 4 h"."""
    left, parts = round(seconds), []
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count}\N{NO-BREAK SPACE}{unit}")
    return " ".join(parts[:2])


@dataclass(frozen=True)
class Thumbnail:
    """A picture as a page holds it.

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
    """A picture, reduced if it is large, for the size of the file."""
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
    """The attributes src, width and height (and class) of <img>."""
    small = thumbnail(picture)
    text = Markup('src="{}" width="{}" height="{}"{}')
    return text.format(small.src, small.width, small.height, " class=crisp" * small.crisp)
