"""Pages from templates, which extend base.html.jinja and its style."""

from pathlib import Path
from typing import Any

from etils import epath
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from clip_jax.common import formatting
from clip_jax.common.pages import svg
from clip_jax.common.pages.pictures import Picture, thumbnail
from clip_jax.storage import writing


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


def image(picture: Picture) -> Markup:
    """Returns the attributes src, width, height and class of an <img>."""
    small = thumbnail(picture)
    text = Markup('src="{}" width="{}" height="{}"{}')
    return text.format(small.src, small.width, small.height, " class=crisp" * small.crisp)
