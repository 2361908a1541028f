"""Templates to files. A template extends base.html.jinja, which has the style of all pages."""

import math
from pathlib import Path
from typing import Any

from etils import epath
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from clip_jax.common.pages import svg
from clip_jax.common.pages.pictures import Picture, thumbnail
from clip_jax.storage import writing


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


def image(picture: Picture) -> Markup:
    """The attributes src, width and height (and class) of <img>."""
    small = thumbnail(picture)
    text = Markup('src="{}" width="{}" height="{}"{}')
    return text.format(small.src, small.width, small.height, " class=crisp" * small.crisp)
